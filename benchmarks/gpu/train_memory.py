"""Peak memory of fine-tuning one VLA in four ways: full, LoRA, head only, and a residual on the frozen policy.

    python -m benchmarks.gpu.train_memory [--tiny]

A random model of half a billion weights with a parallel head; one PPO update of 64 decisions in micro-batches of 8, so
that what differs is weights, gradients, optimiser state and the activations that a backward pass needs. With --tiny (no
CUDA) only weights and optimiser state are counted, exactly.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import device as gpu
from benchmarks.gpu import vla_task

WAYS = ("full", "lora", "head", "residual")


def measure(way: str, device: torch.device, *, tiny: bool) -> dict[str, float]:
    """Megabytes of one way."""
    count, size = (8, 32) if tiny else (64, 224)
    base = vla_task.spec(tiny=tiny, head="parallel", train="frozen" if way == "residual" else way)
    spec = {"id": "residual", "base": base} if way == "residual" else base
    agent = vla_task.make(spec, size=size, device=device)
    learner = vla_task.learner(agent, batch_size=count, micro_batch=8)
    seen = vla_task.observe(count, size=size, seed=0)
    with gpu.half(device):
        taken = agent.policy.act(seen, rng=torch.Generator(device).manual_seed(0))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    learner.learn(vla_task.fill(agent, [(seen, taken)], version=learner.version), np.random.default_rng(0))
    kept = sum(p.nbytes for p in agent.parameters())
    kept += tensor_bytes(learner.state_dict()["optimizers"])
    found = {f"{way}: MB of weights and optimiser": kept / 1e6}
    found[f"{way}: trained, share of weights"] = sum(p.numel() for p in agent.trainable("policy")) / sum(
        p.numel() for p in agent.policy.parameters()
    )
    if device.type == "cuda":
        found[f"{way}: MB at the peak"] = torch.cuda.max_memory_allocated(device) / 1e6
    return found


def tensor_bytes(tree: Any) -> int:
    """Of all tensors in nested mappings and sequences."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(map(tensor_bytes, tree.values()))
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


def main() -> None:
    """Measure all ways, one after the other."""
    chosen = gpu.choose(__doc__)
    if chosen is None:
        return
    device, tiny = chosen
    results: dict[str, float] = {}
    for way in WAYS:
        results |= measure(way, device, tiny=tiny)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    gpu.finish("train_memory", results, device, tiny=tiny)


if __name__ == "__main__":
    main()
