"""Text GRPO on a random model of half a billion weights: tokens per second and utilisation of the matrix units.

    python -m benchmarks.gpu.grpo_tokens [--tiny]

Prompts of 512 tokens in groups of 8, completions of up to 64 tokens. `generate` and `learn` are timed apart. Operations
that learning needs: 6 per weight and token, each distinct prompt counted once (its keys and values are shared), the
embedding table not counted, the output layer only for completion tokens; attention and recomputation are not counted.
Utilisation is that number over the measured rate of a large bfloat16 matrix product.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch

from benchmarks.gpu import device as gpu
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Ragged, Source
from embodied_rft.learning.agent import Agent, build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.protocol import fields_of

# The shape of a 0.5B Qwen2.5 with a wider vocabulary than its tokenizer needs.
LARGE = {"hidden_size": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2, "vocab_size": 151_936}
TINY = {"hidden_size": 32, "num_layers": 1}


def make(device: torch.device, *, tiny: bool, completion: int) -> Agent:
    """A language agent with random weights on the device."""
    spec = {
        "id": "language",
        "model": {"tiny": TINY if tiny else LARGE},
        "prompt": "plain",
        "max_new_tokens": completion,
    }
    texts = gym.spaces.Text(10_000)
    return build_agent(spec, gym.spaces.Dict({"prompt": texts}), texts, torch.Generator().manual_seed(0)).to(device)


def prompts(count: int, *, length: int, group: int) -> list[str]:
    """`count` texts of `length` bytes (tokens), `group` equal ones side by side."""
    letters = np.random.default_rng(0).integers(97, 123, (count // group, length)).astype(np.uint8)
    return [bytes(row).decode() for row in letters for _ in range(group)]


def fill(agent: Agent, texts: list[str], taken: Decisions, *, version: int, group: int) -> Buffer:
    """One-turn episodes with random rewards."""
    fields = fields_of(agent.spaces.observation)
    action = fields_of(agent.spaces.action)["observation"]
    count = len(texts)
    streams, buffer = np.arange(count), Buffer(Schema(fields, action, dict(agent.policy.trace_fields), None), 2 * count)
    seen, over = {"prompt": texts}, np.ones(count, bool)
    reward = np.random.default_rng(1).random(count).astype(np.float32)
    row = {"group": streams // group, "seed": 0, "step": 0, "version": version, "source": Source.ONLINE}
    buffer.add(streams, seen, taken, reward, over, ~over, **row)
    buffer.close(streams, seen)
    return buffer


def operations(agent: Agent, prompt: Ragged, reply: Ragged, group: int) -> float:
    """Floating-point operations that one pass of learning needs."""
    model = agent.policy.model
    layers = sum(p.numel() for p in agent.policy.lm.decoder.parameters()) - model.get_input_embeddings().weight.numel()
    output = model.get_output_embeddings().weight.numel()
    tokens = prompt.lengths[::group].sum() + reply.lengths.sum()
    return 6.0 * (layers * tokens + output * reply.lengths.sum())


def main() -> None:
    """Generate, learn, report."""
    chosen = gpu.choose(__doc__)
    if chosen is None:
        return
    device, tiny = chosen
    count, length, completion, group = (8, 16, 4, 4) if tiny else (128, 512, 64, 8)
    agent = make(device, tiny=tiny, completion=completion)
    objective = build_objective({"id": "grpo", "num_epochs": 1, "batch_size": count})
    objective.setup(agent)
    config = LearnerConfig(learning_rate=1e-6, precision="bf16", micro_batch=None if tiny else 4 * group)
    learner, numbers = Learner(agent, objective, config), np.random.default_rng(0)
    texts, rng = prompts(count, length=length, group=group), torch.Generator(device).manual_seed(0)

    def generate() -> Decisions:
        with gpu.half(device):
            return agent.policy.act({"prompt": texts}, rng=rng)

    repeats = 1 if tiny else 3
    generating = gpu.seconds(generate, device, repeats=repeats)
    taken = generate()
    filled = [fill(agent, texts, taken, version=learner.version + i, group=group) for i in range(repeats + 1)]
    learning = gpu.seconds(lambda: learner.learn(filled.pop(0), numbers), device, repeats=repeats)
    new = float(taken.trace["reply"].lengths.sum())
    rate = gpu.matrix_rate(device)
    needed = operations(agent, agent.policy.prompt_ids({"prompt": texts}), taken.trace["reply"], group)
    results = {
        "completion tokens/s, generate": new / generating,
        "completion tokens/s, learn": new / learning,
        "completion tokens/s, both": new / (generating + learning),
        "matrix product, TFLOP/s": rate / 1e12,
        "model FLOP utilisation of learn": needed / learning / rate,
    }
    gpu.finish("grpo_tokens", results, device, tiny=tiny, prompt=length, completion=completion, group=group)


if __name__ == "__main__":
    main()
