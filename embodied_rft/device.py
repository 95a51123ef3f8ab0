"""Where a run computes: one word for processor or GPU, and random generators that live where the numbers are needed."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from embodied_rft.names import UserError

DEVICE = r"auto|cpu|cuda(:\d+)?"


def resolve_device(word: str) -> torch.device:
    """The device that "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1" means here.

    Of several processes that learn together, each takes the GPU of its local rank where none is named.

    Raises:
        ValueError: another word, or a GPU that is not there.
    """
    if not re.fullmatch(DEVICE, word):
        raise UserError(f"device is {word!r}; expected auto, cpu, cuda or cuda:NUMBER")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == "cpu" or (word == "auto" and not count):
        return torch.device("cpu")
    index = int(word.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        found = f"{count} are here" if count else "PyTorch finds none (erft doctor says more)"
        raise UserError(f"device is {word!r}, which needs GPU {index}, but {found}: set device to cpu or auto")
    return torch.device("cuda", index)


def device_of(module: nn.Module) -> torch.device:
    """Where the first weight of a module lives, the CPU if it has none; asked in every step, so without names."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        if (module_ := waiting.pop()) is None:
            continue
        for parameter in module_._parameters.values():
            if parameter is not None:
                return parameter.device
        waiting.extend(reversed(module_._modules.values()))
    return torch.device("cpu")


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on a device."""
    return torch.Generator(device).manual_seed(seed)


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """The generator itself, or a fresh one from the same seed where the numbers are drawn on another device."""
    same = generator.device.type == device.type and generator.device.index in (None, device.index)
    return generator if same else seeded(generator.initial_seed(), device)


def drawn_on(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """The generator itself, or one on another kind of device whose seed is drawn from it, anew with every call."""
    if generator.device.type == device.type:
        return generator
    return seeded(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)), device)


def generator_state(generator: np.random.Generator | torch.Generator) -> dict[str, Any]:
    """What a checkpoint keeps of a generator."""
    if isinstance(generator, torch.Generator):
        return {"torch": generator.get_state(), "device": generator.device.type}
    return {"numpy": generator.bit_generator.state}


def restored_generator(state: dict[str, Any], device: torch.device) -> np.random.Generator | torch.Generator | None:
    """A generator that goes on where `generator_state` was taken; None: that was on another kind of device."""
    if "numpy" in state:
        bits = np.random.PCG64()
        bits.state = state["numpy"]
        return np.random.Generator(bits)
    if state["device"] not in ("cpu", device.type):
        return None
    generator = torch.Generator(device if state["device"] == device.type else "cpu")
    generator.set_state(state["torch"])
    return generator
