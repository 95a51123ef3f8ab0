"""How many of the computed tokens are useful: buckets and shared prefixes against batches padded after sorting.

Lengths are drawn, no model runs. "agent": groups of 8 replies (median 90 tokens) to prompts of median 400 tokens.
"math": groups of 8 replies of median 400 tokens, long-tailed, to prompts of median 120. `useful_share` is the smaller
of the two; `ratio` compares computed tokens with the best padded layout that repeats each prompt for every reply,
sorted by length, 8 rows at a time.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import Result, arguments, finish
from embodied_rft.data import Ragged
from embodied_rft.packing import plan_micro_batches
from embodied_rft.prefix import computed_tokens

GROUP = 8


def draw(kind: str, num_groups: int, rng: np.random.Generator) -> tuple[Ragged, Ragged, np.ndarray]:
    """(prompts, replies, group) of num_groups * 8 rows."""
    prompt, reply = {"agent": ((400, 0.5), (90, 0.7)), "math": ((120, 0.4), (400, 0.9))}[kind]
    prompt_lengths = 1 + rng.lognormal(np.log(prompt[0]), prompt[1], size=num_groups).astype(int)
    reply_lengths = 2 + rng.lognormal(np.log(reply[0]), reply[1], size=num_groups * GROUP).astype(int)
    group = np.repeat(np.arange(num_groups), GROUP)
    texts = [rng.integers(1000, size=n) for n in prompt_lengths]
    return Ragged.of([texts[g] for g in group]), Ragged.of([np.zeros(n, np.int64) for n in reply_lengths]), group


def padded(lengths: np.ndarray, rows: int) -> int:
    """Tokens of batches of `rows` rows, each padded to its longest."""
    return sum(len(part) * int(part.max()) for part in np.split(lengths, range(rows, len(lengths), rows)))


def main() -> None:
    options = arguments(__doc__)
    grid = Table("lengths", "layout", "tokens computed", "useful", title="useful / computed tokens")
    shares, ratios = [], []
    rounds: dict[str, list[float]] = {}
    for kind in ("agent", "math"):
        for seed in range(2 if options.quick else 8):
            prompts, replies, group = draw(kind, 64, np.random.default_rng(seed))
            dense = prompts.lengths + replies.lengths - 1
            once = prompts.lengths[::GROUP].sum() + (replies.lengths - 1).sum()
            plan = plan_micro_batches(prompts.lengths, replies.lengths, group, budget=16_384)
            bins = sum(computed_tokens(prompts.take(rows), replies.take(rows)) for rows in plan)
            layouts = {
                "padded to the longest": (len(dense) * int(dense.max()), dense.sum()),
                "padded, 8 rows, as they come": (padded(dense, GROUP), dense.sum()),
                "padded, 8 rows, sorted": (padded(np.sort(dense), GROUP), dense.sum()),
                "ours, one batch": (computed_tokens(prompts, replies), once),
                "ours, micro-batches of 16,384": (bins, once),
            }
            for name, (computed, useful) in layouts.items():
                rounds.setdefault(f"{kind}: {name}", []).append(useful / computed)
                if seed == 0:
                    grid.add_row(kind, name, f"{computed:,}", f"{useful / computed:.3f}")
            shares.append(once / bins)
            ratios.append(layouts["padded, 8 rows, sorted"][0] / bins)
    Console(width=110).print(grid)
    finish(
        name="packing",
        results={name: Result(name, values) for name, values in rounds.items()},
        ratio=float(np.median(ratios)),
        useful_share=float(min(shares)),
    )


if __name__ == "__main__":
    main()
