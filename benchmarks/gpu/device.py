"""Shared by the scripts of this folder: the command line, timing on a device, the matrix rate, one JSON line last.

Boundary: measures; makes no model and no data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.common import machine


def choose(description: str | None) -> tuple[torch.device, bool] | None:
    """(device, tiny), or None after one sentence where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: shows that the script runs")
    if parser.parse_args().tiny:
        torch.set_num_threads(1)
        return torch.device("cpu"), True
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none; --tiny runs it on the CPU with tiny models")
        return None
    return torch.device("cuda"), False


def seconds(work: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """Median seconds of one call, after one that is not counted."""
    times = []
    for index in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if index:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def wait(device: torch.device) -> None:
    """Until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def half(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products, as the learner computes with precision bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large bfloat16 matrix product: what utilisation is measured against."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, repeats=5)


def finish(name: str, results: Mapping[str, float], device: torch.device, *, tiny: bool, **setting: Any) -> None:
    """One row a number, then one JSON object as the last line."""
    for key, value in results.items():
        print(f"{key:45} {value:>14,.3f}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    summary = {"name": name, "tiny": tiny, "device": where, "setting": setting, "results": dict(results)}
    print(json.dumps(summary | {"machine": machine()}))
