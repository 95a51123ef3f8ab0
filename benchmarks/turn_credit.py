"""Credit of 10,000 turns: milliseconds of the processor for whole groups, turn GAE, and groups at equal observations.

    python -m benchmarks.turn_credit [--quick]

Beside each stands the plain loop over rows that agent frameworks write: a scan of all rows for every row (returns),
Python numbers turn by turn (GAE), a tuple of all pixels as the key of a dictionary (anchors). Loops whose time grows
with the square of the rows run on a tenth of them in a quick round, and are told for what they ran on. The episodes are
16 siblings each with 1 to 50 turns; pictures of 64x64 pixels are shared as a blob store shares them, or lie row by row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import common
from embodied_rft.learning.anchors import anchors
from embodied_rft.objectives.credit import among_siblings, make_credit

TURNS, SIBLINGS, PIXELS, SHOWN = 10_000, 16, (64, 64, 3), 1_500  # distinct pictures


def episodes(turns: int, rng: np.random.Generator) -> tuple[Any, list[int]]:
    """What a credit reads of so many turns, and the lengths of their episodes."""
    lengths: list[int] = []
    while sum(lengths) < turns:
        lengths.append(min(int(rng.integers(1, 51)), turns - sum(lengths)))
    index = np.repeat(np.arange(len(lengths)), lengths)
    last = np.cumsum(lengths) - 1
    discount = torch.full((turns,), 0.95)
    discount[torch.from_numpy(last)] = 0.0
    pictures = [np.frombuffer(rng.bytes(int(np.prod(PIXELS))), np.uint8).reshape(PIXELS) for _ in range(SHOWN)]
    shown = [pictures[i] for i in rng.integers(SHOWN, size=turns)]
    value = torch.from_numpy(rng.normal(size=turns).astype(np.float32))
    batch = SimpleNamespace(
        reward=torch.from_numpy((rng.random(turns) < 0.1).astype(np.float32)),
        discount=discount,
        columns={"group": index // SIBLINGS, "episode": index},
        observation={"image": [[picture] for picture in shown]},
        notes={"value": value, "next_value": value.roll(-1)},
        mask=torch.ones(turns, 1, dtype=torch.bool),
    )
    return batch, lengths


# --- the loops -------------------------------------------------------------------------------------------------------


def groups_by_row(batch: Any, lengths: list[int]) -> list[float]:
    """Lists of scores in a dictionary, then a row at a time."""
    episode, group = batch.columns["episode"], batch.columns["group"]
    scores: dict[int, list[Any]] = {}
    totals: dict[int, Any] = {}
    for i in range(len(episode)):
        totals[int(episode[i])] = totals.get(int(episode[i]), 0.0) + batch.reward[i]
    for number, total in totals.items():
        scores.setdefault(number // SIBLINGS, []).append(total)
    mean = {key: torch.mean(torch.tensor(each)) for key, each in scores.items()}
    std = {key: torch.std(torch.tensor([each])) for key, each in scores.items()}
    advantage = []
    for i in range(len(episode)):
        g = int(group[i])
        advantage.append((totals[int(episode[i])] - mean[g]) / (std[g] + 1e-6))
    return advantage


def gae_by_row(batch: Any, lengths: list[int]) -> list[float]:
    """One `.item()` a number."""
    advantage, running, ends = [0.0] * len(batch.reward), 0.0, set(np.cumsum(lengths) - 1)
    value, following = batch.notes["value"], batch.notes["next_value"]
    for i in reversed(range(len(batch.reward))):
        delta = batch.reward[i].item() + batch.discount[i].item() * following[i].item() - value[i].item()
        running = delta + (0.0 if i in ends else 0.95 * batch.discount[i].item() * running)
        advantage[i] = running
    return advantage


def anchors_by_row(batch: Any, lengths: list[int]) -> list[int]:
    """A tuple of all pixels."""
    seen: dict[Any, int] = {}
    keys = zip(batch.columns["group"].tolist(), batch.observation["image"], strict=True)
    return [seen.setdefault((g, tuple(row[0].flatten())), len(seen)) for g, row in keys]


def gigpo_by_row(batch: Any, lengths: list[int]) -> list[float]:
    """Anchors as above; the return of a row is a scan of all rows."""
    key, episode, reward = anchors_by_row(batch, lengths), batch.columns["episode"], batch.reward.numpy()
    after = []
    for i in range(len(reward)):
        same = np.where(episode == episode[i])[0]
        after.append(sum(0.95 ** int(k - i) * float(reward[k]) for k in same if k >= i))
    scores: dict[int, list[float]] = {}
    for one, total in zip(key, after, strict=True):
        scores.setdefault(one, []).append(total)
    return [total - float(np.mean(scores[one])) for one, total in zip(key, after, strict=True)]


def once(work: Callable[[], Any]) -> float:
    """Milliseconds of the processor."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def main() -> None:
    """Measure, print."""
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    batch, lengths = episodes(TURNS, np.random.default_rng(0))
    dense = {"image": np.stack([row[0] for row in batch.observation["image"]])}
    config: Any = SimpleNamespace(gamma=0.95, trace_decay=0.95)
    gae, gigpo = make_credit("gae"), make_credit({"id": "gigpo", "spread": "none"})
    few, short = episodes(TURNS // 10 if options.quick else TURNS, np.random.default_rng(0))
    agent: Any = None
    runs: dict[str, Callable[[], Any]] = {
        "groups": lambda: among_siblings(batch, lengths, baseline="grpo", who="grpo"),
        "turn GAE": lambda: gae(agent, batch, lengths, config),
        "anchors": lambda: anchors(batch.observation),
        "anchors, row by row": lambda: anchors(dense),
        "GiGPO": lambda: gigpo(agent, batch, lengths, config),
        "groups, loop": lambda: groups_by_row(batch, lengths),
        "turn GAE, loop": lambda: gae_by_row(batch, lengths),
        f"anchors, loop, {len(few.reward):,} turns": lambda: anchors_by_row(few, short),
        f"GiGPO, loop, {len(few.reward):,} turns": lambda: gigpo_by_row(few, short),
    }
    _, found = np.unique(anchors_by_row(few, short), return_inverse=True)
    ours = anchors(few.observation)
    pairs = set(zip(few.columns["group"].tolist(), ours.tolist(), strict=True))
    assert len(pairs) == found.max() + 1, "the loop and ours find other groups"
    slow = torch.tensor(gae_by_row(batch, lengths))
    torch.testing.assert_close(slow, gae(agent, batch, lengths, config)["advantage"], atol=1e-4, rtol=1e-4)
    rounds = 1 if options.quick else 5
    results = common.measure(
        {n: (lambda work=work: once(work)) for n, work in runs.items()},  # type: ignore[misc]
        rounds=rounds,
        warm_up=not options.quick,
    )
    common.table(results, unit="ms", title=f"Credit of {TURNS:,} turns")
    slowest = max(results[name].median for name in ("groups", "turn GAE", "anchors", "GiGPO"))
    ratio = common.ratio(results, "turn GAE, loop", "turn GAE")
    common.finish(name="turn_credit", results=results, ratio=ratio, slowest_ms=slowest, turns=TURNS)


if __name__ == "__main__":
    main()
