"""Several processes that learn as one: `torchrun --nproc-per-node 2 -m -- embodied_rft.cli train RECIPE`.

k processes are to one what k micro-batches are to one batch: each takes its share of the experience, losses are divided
by the numbers of the whole batch, gradients are summed once per step of an optimiser, so weights stay equal. The
functions here are all that the engine knows about it; in a single process they hand back what they are given. Plain
torch.distributed (gloo on CPUs, nccl for tensors on GPUs), nothing is pickled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from embodied_rft import variables
from embodied_rft.names import UserError

T = TypeVar("T")
BUCKET_ELEMENTS = 2**24  # gradients that are summed in one message: 64 MB


class LostRankError(ConnectionError):
    """Another process died or is too late: this one cannot go on, and must not wait for ever."""


def size() -> int:
    """How many processes learn together; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 <= rank < size; 0 writes what is written once."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined() -> Iterator[None]:
    """Together with the processes of the launcher (`torchrun`, `accelerate launch`) inside the block, or alone.

    Raises:
        LostRankError: the others did not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=variables.timeout())
    with _no_endless_wait():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timeout)
    yield
    gather(None)  # nobody leaves while another still listens; after an error nothing is waited for
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several skips the interpreter's shutdown: threads of gloo that still let go of a tensor abort in it (pytorch
    issue 179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def share(count: int, what: str) -> int:
    """How many of `count` this process takes.

    Raises:
        ValueError: they cannot be shared evenly.
    """
    if count % size():
        raise UserError(
            f"{what} is {count}, which {size()} processes cannot share evenly: choose a multiple of {size()}, or start "
            "another number of processes"
        )
    return count // size()


def gather(value: T) -> list[T]:
    """What every process gives, in the order of their ranks: numbers, texts, lists and dicts, as JSON."""
    if size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    with _no_endless_wait():
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = int(max(lengths))
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(padded, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(padded, lengths, strict=True)]


def total(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over all processes, name by name; a process may lack some names."""
    result: dict[str, Any] = {}
    for given in gather(dict(numbers)):
        for name, number in given.items():
            result[name] = result[name] + number if name in result else number
    return result


def mean(numbers: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes that give a name."""
    sums, counts = total(numbers), total(dict.fromkeys(numbers, 1))
    return {name: sums[name] / counts[name] for name in sums}


def any_of(flag: bool) -> bool:
    """Whether it holds in any process."""
    return any(gather(bool(flag)))


def in_step(items: Iterable[T]) -> Iterator[T | None]:
    """The items of this process, then None until every process has come to its end."""
    if size() == 1:
        yield from items
        return
    own = iter(items)
    while True:
        item = next(own, None)
        if not any_of(item is not None):
            return
        yield item


def seed_key(name: str) -> tuple[int, ...]:
    """What sets the generator `name` apart: weights are drawn alike in all processes, everything else is not."""
    own = 0 if name in ("agent", "setup") else rank()
    return (*name.encode(), *([256 + own] if own else []))


def check_size(before: int, folder: Path) -> None:
    """Raise ValueError when the run in a folder was started with another number of processes."""
    if before != size():
        raise UserError(
            f"{folder} holds a run of {before} processes, {size()} were started now: continue it with {before}, or "
            "choose another folder"
        )


def equalize(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values of rank 0, bit for bit."""
    if size() == 1:
        return
    for tensor in tensors:
        if not tensor.numel():
            continue
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        with _no_endless_wait():
            dist.broadcast(content, src=0)
        if content.data_ptr() != tensor.data_ptr():  # a copy, since it was not contiguous
            tensor.detach().copy_(content.view(tensor.dtype).reshape(tensor.shape))


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes, in float32; a weight without one in any process is left without."""
    if size() == 1:
        return
    with _no_endless_wait():
        given = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(given, op=dist.ReduceOp.MAX)
        trained = [p for p, flag in zip(parameters, given.tolist(), strict=True) if flag]
        for bucket in _buckets(trained):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([g.float().flatten() for g in gradients])
            dist.all_reduce(flat)
            for p, g, summed in zip(bucket, gradients, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = g.copy_(summed.view_as(p))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        if bucket and elements + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        yield bucket


@contextmanager
def _no_endless_wait() -> Iterator[None]:
    """Errors of the connection as one that says what has happened."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LostRankError(
            f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} waits for one that has died "
            f"or is too late ({reason}). The cause stands in the output of the other one; the same command continues "
            "the run from its last checkpoint."
        ) from error
