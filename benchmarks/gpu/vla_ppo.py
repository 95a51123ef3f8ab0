"""VLA PPO: decisions per second of acting and of learning, for each head, on a random model of half a billion weights.

    python -m benchmarks.gpu.vla_ppo [--tiny]

Two cameras of 224x224, chunks of 4 steps of 7 numbers. Acting is one call of `act` for all environments in bfloat16;
learning is one epoch of PPO over what was collected, values read from the trunk, forward and backward through all
weights. The rate of both together is what a run would reach with an environment that takes no time.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu import device as gpu
from benchmarks.gpu import vla_task


def measure(head: str, device: torch.device, *, tiny: bool) -> dict[str, float]:
    """Decisions per second of one head."""
    count, steps, size = (4, 2, 32) if tiny else (64, 4, 224)
    checkpointing = not tiny
    agent = vla_task.make(
        vla_task.spec(tiny=tiny, head=head, gradient_checkpointing=checkpointing), size=size, device=device
    )
    learner = vla_task.learner(agent, batch_size=count * steps, micro_batch=count)
    rng, numbers = torch.Generator(device).manual_seed(0), np.random.default_rng(0)
    seen = [vla_task.observe(count, size=size, seed=i) for i in range(steps)]

    def act() -> list:
        with gpu.half(device):
            return [(o, agent.policy.act(o, rng=rng)) for o in seen]

    acting = gpu.seconds(act, device, repeats=1 if tiny else 5)
    taken = act()
    filled = [vla_task.fill(agent, taken, version=learner.version + i) for i in range(2 if tiny else 4)]
    learning = gpu.seconds(lambda: learner.learn(filled.pop(0), numbers), device, repeats=len(filled) - 1)
    total = count * steps
    return {
        f"{head}: decisions/s, acting": total / acting,
        f"{head}: decisions/s, learning": total / learning,
        f"{head}: decisions/s, both": total / (acting + learning),
    }


def main() -> None:
    """Measure all heads."""
    chosen = gpu.choose(__doc__)
    if chosen is None:
        return
    device, tiny = chosen
    results: dict[str, float] = {}
    for head in ("tokens", "parallel", "flow"):
        results |= measure(head, device, tiny=tiny)
    gpu.finish("vla_ppo", results, device, tiny=tiny, horizon=vla_task.HORIZON, action=vla_task.ACTION)


if __name__ == "__main__":
    main()
