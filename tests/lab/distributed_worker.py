"""One of several processes of tests/learning/test_distributed.py: learns from its share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import save_file

from embodied_rft import distributed
from embodied_rft.data import Batch, Ragged
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from tests.lab.point import random_batch

TEXT = gym.spaces.Text(64)
STATE, ACTION = gym.spaces.Box(-np.inf, np.inf, (6,)), gym.spaces.Box(-1, 1, (4,))
CONFIG = {"clip_norm": 0.5, "learning_rate": 1e-2, "ema": 0.9, "weight_decay": 0.01}
TINY = {"id": "language", "model": {"tiny": {"hidden_size": 32}}, "max_new_tokens": 9}
CASES = {
    "gaussian": ({"id": "gaussian", "hidden": [16]}, {"id": "bc"}, {}),
    "critic": ({"id": "gaussian", "hidden": [16]}, {"id": "iql", "critic_hidden": [16]}, {}),
    "language": (TINY, {"id": "grpo"}, {"micro_units": 120}),
    "minibatch": (TINY, {"id": "grpo", "normalize_advantage": "minibatch"}, {"micro_units": 120}),
    "lora": (TINY | {"train": "lora", "lora": {"rank": 4}}, {"id": "grpo"}, {}),
}
UPDATES = 3


def text_batch(seed: int, count: int = 12) -> Batch:
    """Replies of different lengths to four prompts, in groups of three."""
    rng = np.random.default_rng(seed)
    prompts = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(8, 40))) for _ in range(count // 3)]
    reply = Ragged.of([rng.integers(5, 200, size=rng.integers(1, 9)) for _ in range(count)])
    mask, zeros = torch.from_numpy(reply.pad()[1]), torch.zeros(count)
    advantage = torch.from_numpy(rng.standard_normal(count)).float()
    return Batch(
        observation={"prompt": [prompts[i // 3] for i in range(count)]},
        action=[""] * count,
        reward=zeros,
        discount=zeros,
        next_observation={},
        log_prob=torch.where(mask, -5.5, 0.0),
        mask=mask,
        trace={"reply": reply},
        notes={"advantage": advantage, "episode_units": mask.sum(1).float()},
        num_decisions=count,
        num_units=int(mask.sum()),
        num_episodes=count,
    )


def spaces_of(name: str) -> tuple[gym.Space, gym.Space]:
    """What a case observes and does."""
    return (STATE, ACTION) if CASES[name][0]["id"] == "gaussian" else (gym.spaces.Dict({"prompt": TEXT}), TEXT)


def learn(name: str, rank: int, size: int) -> tuple[Learner, list[dict[str, float]]]:
    """Three updates; process r takes the decisions r * B / size ... of each batch, of the last one none but rank 0."""
    agent_spec, objective_spec, config = CASES[name]
    agent = build_agent(agent_spec, *spaces_of(name), torch.Generator().manual_seed(7 + rank))
    objective = build_objective(objective_spec)
    objective.setup(agent)
    distributed.equalize(agent.state_dict().values())
    learner = Learner(agent, objective, LearnerConfig(**CONFIG, **config))
    metrics = []
    for number in range(UPDATES):
        vectors = spaces_of(name)[0] is STATE
        batch = random_batch(STATE, ACTION, size=12, seed=number) if vectors else text_batch(number)
        ends = [0, *(12 * (i + 1) // size for i in range(size))]
        if number == UPDATES - 1 and size > 1:
            ends = [0] + [12] * size
        own = np.arange(ends[rank], ends[rank + 1])
        part = batch.take(own) if len(own) else None
        if part is not None:
            part.num_decisions = part.num_episodes = len(part)
            part.num_units = int(part.mask.sum())
        learner.update(part, torch.Generator().manual_seed(number))
        metrics.append(learner.metrics())
    return learner, metrics


def main(name: str, folder: str) -> None:
    """Learn in all cases, or fail in the way that is asked for."""
    torch.set_num_threads(1)
    with distributed.joined():
        rank, size = distributed.rank(), distributed.size()
        if name == "dies" and rank == 1:
            os._exit(3)
        if name == "hangs" and rank == 1:
            import time

            time.sleep(60)
        if name in ("dies", "hangs"):
            try:
                distributed.gather(rank)
            except distributed.LostRankError as error:
                Path(folder, "message").write_text(str(error))
                os._exit(4)
        gathered = distributed.gather({"rank": rank, "text": "ä", "list": [1.5] * rank})
        assert [g["rank"] for g in gathered] == list(range(size)) and gathered[1]["list"] == [1.5]
        assert distributed.total({"a": 1} if rank else {"a": 2, "b": 1}) == {"a": 3, "b": 1}
        assert list(distributed.in_step(range(rank))) == [None, 0][rank : rank + 1]
        for case in CASES:
            learner, metrics = learn(case, rank, size)
            state = {f"weights/{k}": v.contiguous().clone() for k, v in learner.agent.state_dict().items()}
            state |= {f"first/{i}": m for i, m in enumerate(learner.optimizers["policy"].first)}
            state |= {f"metrics/{i}/{k}": torch.tensor(v) for i, m in enumerate(metrics) for k, v in m.items()}
            save_file(state, Path(folder) / f"{case}-{rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave(0)
