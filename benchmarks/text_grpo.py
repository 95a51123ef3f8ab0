"""End-to-end GRPO on text (generate, reward, credit, loss, step): completion tokens a second against TRL's GRPOTrainer.

Same random Qwen2-type model (4 layers, width 256, vocabulary about 2048), same prompts, 4 prompts x 8 replies of
exactly 64 tokens a step, one epoch, no KL, AdamW, gradient norm clipped, fp32, one thread, no gradient checkpointing
on either side. Ours runs through pool, collector, buffer, learner and the objective `grpo`, as a recipe does. `ratio`
is for prompts of 512 tokens, `ratio_short` for 32; `memory_ratio` is the growth of the peak memory of a process of its
own, ours over TRL's, at 512.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import embodied_rft.envs  # noqa: F401  (registers the environment)
from benchmarks.common import Results, arguments, finish, measure, ratio, table
from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm, tiny_tokenizer
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import Agent, build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.pool import make_pool
from embodied_rft.registry import register

GROUP, REPLY = 8, 64


class Job(NamedTuple):
    """What a step is made of: a model folder, prompts of `length` tokens, `rows` replies (8 for each prompt)."""

    folder: Path
    length: int
    rows: int


@register("reward", "share_of_vowels")
def share_of_vowels(reply: str, answer: str) -> float:
    """A reward that differs between replies and costs nothing."""
    return sum(reply.count(vowel) for vowel in "aeiou") / max(1, len(reply))


def save_model(folder: Path) -> None:
    """A random model; its tokenizer has learned lower-case pairs only, so that A-Z in prompts stay single tokens."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(2, 8))) for _ in range(6000)]
    config = TinyConfig(hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4)
    tokenizer = tiny_tokenizer(merges=1788, corpus=[" ".join(words)])
    model, _ = tiny_causal_lm(config, rng=torch.Generator().manual_seed(0), tokenizer=tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_prompts(length: int, count: int) -> list[str]:
    """Texts of exactly `length` tokens."""
    rng = np.random.default_rng(length)
    return ["".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), size=length)) for _ in range(count)]


def make_ours(job: Job) -> Callable[[], None]:
    """One step of our loop."""
    problems = job.folder / f"problems_{job.length}.jsonl"
    lines = [{"prompt": p, "answer": "", "checker": "share_of_vowels"} for p in make_prompts(job.length, 64)]
    problems.write_text("\n".join(map(json.dumps, lines)))
    pool = make_pool("embodied_rft/TextJsonl-v0", job.rows, options={"path": str(problems)})
    rng = torch.Generator().manual_seed(0)
    spec = {"id": "language", "model": str(job.folder), "prompt": "plain", "max_new_tokens": REPLY}
    agent: Agent = build_agent(spec, pool.observation_space, pool.action_space, rng)
    policy = agent.policy
    policy.lm.eos = frozenset()  # every reply has its full length
    schema = Schema(dict(pool.fields), pool.action_field, dict(policy.trace_fields), units=None)
    buffer = Buffer(schema, 4 * job.rows)
    objective = build_objective({"id": "grpo", "num_epochs": 1, "batch_size": job.rows})
    objective.setup(agent, rng)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-6, clip_norm=1.0))
    collector = Collector(pool, run_seed=0, group_size=GROUP)
    numbers = np.random.default_rng(0)

    def step() -> None:
        recording = collector.collect(
            lambda observation: policy.act(observation, rng=rng), episodes=job.rows, version=learner.version
        )
        recording.write(buffer)
        learner.learn(buffer, numbers)

    return step


def make_trl(job: Job) -> Callable[[int], list[float]]:
    """A function that runs some steps of GRPOTrainer and gives the seconds of each."""
    import transformers
    from datasets import Dataset, disable_progress_bars
    from trl import GRPOConfig, GRPOTrainer

    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    data = Dataset.from_dict({"prompt": make_prompts(job.length, 64)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder)
    original = transformers.AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    config: dict[str, Any] = {
        "output_dir": str(job.folder / "trl"),
        "per_device_train_batch_size": job.rows,
        "num_generations": GROUP,
        "max_completion_length": REPLY,
        "generation_kwargs": {"min_new_tokens": REPLY},
        "beta": 0.0,
        "num_iterations": 1,
        "learning_rate": 1e-6,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }

    def rewards(completions: list[str], **_: Any) -> list[float | None]:
        return [share_of_vowels(text, "") for text in completions]

    def run(num_steps: int) -> list[float]:
        marks: list[float] = []

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                marks.append(time.perf_counter())

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                marks.append(time.perf_counter())

        trainer = GRPOTrainer(
            model=copy.deepcopy(original),
            reward_funcs=rewards,
            args=GRPOConfig(max_steps=num_steps, **config),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return np.diff(marks)[::2].tolist()

    return run


def speeds(job: Job, *, rounds: int, steps: int, warm_up: int = 1) -> Results:
    """Completion tokens a second of both; the first `warm_up` steps of each run are not counted."""
    ours, theirs = make_ours(job), make_trl(job)
    tokens = job.rows * REPLY

    def rate_ours() -> float:
        seconds = []
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            ours()
            seconds.append(time.perf_counter() - start)
        return tokens / float(np.mean(seconds[warm_up:]))

    def rate_trl() -> float:
        return tokens / float(np.mean(theirs(warm_up + steps)[warm_up:]))

    return measure({"ours": rate_ours, "TRL": rate_trl}, rounds=rounds, warm_up=False)


def peak_growth(who: str, job: Job) -> float:
    """MB that a step adds to the peak memory of a fresh process in which everything is loaded."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grow, who, job).result()


def _grow(who: str, job: Job) -> float:
    torch.set_num_threads(1)
    step: Callable[[], Any] = make_ours(job) if who == "ours" else functools.partial(make_trl(job), 1)
    before = _peak()
    step()
    return _peak() - before


def _peak() -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    rows = (2 if options.quick else 4) * GROUP
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        rounds, steps, warm_up = (1, 1, 0) if options.quick else (5, 3, 1)
        short = speeds(Job(folder, 32, rows), rounds=rounds, steps=steps)
        long = speeds(Job(folder, 512, rows), rounds=rounds, steps=steps, warm_up=warm_up)
        ours, theirs = (peak_growth(who, Job(folder, 512, rows)) for who in ("ours", "TRL"))
    table(long, unit="completion tokens/s", title="prompt 512", baseline="TRL")
    table(short, unit="completion tokens/s", title="prompt 32", baseline="TRL")
    print(f"peak memory at prompt 512: ours +{ours:.0f} MB, TRL +{theirs:.0f} MB")
    finish(
        name="text_grpo",
        results={f"512 {k}": v for k, v in long.items()} | {f"32 {k}": v for k, v in short.items()},
        ratio=ratio(long, "ours", "TRL"),
        ratio_short=ratio(short, "ours", "TRL"),
        memory_ratio=ours / theirs,
    )


if __name__ == "__main__":
    main()
