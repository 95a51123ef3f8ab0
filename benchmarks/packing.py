"""How many of the computed tokens are useful: the learner's micro-batches against batches padded after sorting.

Lengths are drawn, no model runs. "agent": groups of 8 replies (median 90 tokens) to prompts of median 400 tokens.
"math": groups of 8 replies of median 400 tokens, long-tailed, to prompts of median 120. "turns": groups of 8 episodes
of 6 turns (median 90 tokens, observations of median 150 between them), each turn's prompt being all that was said
before. Ours is what `micro_units: 16384` makes of a batch, a shared beginning counted as useful once; `useful_share` is
the smallest over kinds and seeds. `ratio` compares computed tokens of "agent" and "math" with the best padded layout
that repeats each prompt for every reply, sorted by length, 8 rows at a time; `ratio_turns` does so for "turns".
"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import Result, arguments, finish
from embodied_rft.data import Ragged
from embodied_rft.tokens.micro_batches import plan_within
from embodied_rft.tokens.prefix_tree import count_tokens

GROUP, TURNS, MOST = 8, 6, 16_384


def draw(kind: str, num_groups: int, rng: np.random.Generator) -> tuple[Ragged, Ragged]:
    """(prompts, replies) of num_groups * 8 episodes."""
    if kind == "turns":
        return draw_turns(num_groups // TURNS, rng)
    prompt, reply = {"agent": ((400, 0.5), (90, 0.7)), "math": ((120, 0.4), (400, 0.9))}[kind]
    prompt_lengths = 1 + rng.lognormal(np.log(prompt[0]), prompt[1], size=num_groups).astype(int)
    reply_lengths = 2 + rng.lognormal(np.log(reply[0]), reply[1], size=num_groups * GROUP).astype(int)
    texts = [rng.integers(100_000, size=n) for n in prompt_lengths]
    prompts = Ragged.of([texts[g] for g in np.repeat(np.arange(num_groups), GROUP)])
    return prompts, Ragged.of([rng.integers(100_000, size=n) for n in reply_lengths])


def draw_turns(num_groups: int, rng: np.random.Generator) -> tuple[Ragged, Ragged]:
    """The same for episodes of several turns."""

    def text(median: float, spread: float) -> np.ndarray:
        return rng.integers(100_000, size=2 + int(rng.lognormal(np.log(median), spread)))

    prompts, replies = [], []
    for _ in range(num_groups):
        task = text(400, 0.5)
        for _ in range(GROUP):
            said = task
            for _ in range(TURNS):
                prompts.append(said)
                replies.append(text(90, 0.7))
                said = np.concatenate([said, replies[-1], text(150, 0.5)])
    return Ragged.of(prompts), Ragged.of(replies)


def padded(lengths: np.ndarray, rows: int) -> int:
    """Tokens of batches of `rows` rows, each padded to its longest."""
    return sum(len(part) * int(part.max()) for part in np.split(lengths, range(rows, len(lengths), rows)))


def main() -> None:
    options = arguments(__doc__)
    grid = Table("lengths", "layout", "tokens computed", "useful", title="useful / computed tokens")
    shares: list[float] = []
    ratios: dict[str, list[float]] = {"agent": [], "math": [], "turns": []}
    rounds: dict[str, list[float]] = {}
    for kind, found in ratios.items():
        for seed in range(2 if options.quick else 8):
            prompts, replies = draw(kind, 64, np.random.default_rng(seed))
            dense = prompts.lengths + replies.lengths - 1
            whole = count_tokens(prompts, replies)
            plan = plan_within(prompts, replies, most=MOST)
            bins = sum(count_tokens(prompts.take(rows), replies.take(rows)).computed for rows in plan)
            layouts = {
                "padded to the longest": (len(dense) * int(dense.max()), dense.sum()),
                "padded, 8 rows, as they come": (padded(dense, GROUP), dense.sum()),
                "padded, 8 rows, sorted": (padded(np.sort(dense), GROUP), dense.sum()),
                "ours, one batch": (whole.computed, whole.useful),
                f"ours, micro-batches of {MOST:,}": (bins, whole.useful),
            }
            for name, (computed, useful) in layouts.items():
                rounds.setdefault(f"{kind}: {name}", []).append(useful / computed)
                if seed == 0:
                    grid.add_row(kind, name, f"{computed:,}", f"{useful / computed:.3f}")
            shares.append(whole.useful / bins)
            found.append(layouts["padded, 8 rows, sorted"][0] / bins)
    Console(width=110).print(grid)
    finish(
        name="packing",
        results={name: Result(name, values) for name, values in rounds.items()},
        ratio=float(np.median(ratios["agent"] + ratios["math"])),
        ratio_turns=float(np.median(ratios["turns"])),
        useful_share=float(min(shares)),
    )


if __name__ == "__main__":
    main()
