"""Forward and backward pass of image conversations: turns and siblings computed once, against every row by itself.

    python -m benchmarks.vlm_turns [--quick]

Groups of G episodes of T turns: every turn shows a 64x64 picture (16 tokens) and a message, and is answered by a reply.
Siblings begin with the same picture and message. A batch has a row for each of the G T turns, as a buffer gives it: the
new message, and the window over the rows before it. Both sides are the same policy (`language` on a random Qwen2.5-VL
of width 256 and 4 layers, vision tower trained too), and both compute a picture once, which favours the dense side.
The bound is the ratio of tokens through the decoder's linear layers, all of them over the distinct ones; what attention
saves is not in it. `of_bound` is the median share of it over the shapes, `of_bound_min` the least.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import gymnasium
import numpy as np
import torch

from benchmarks.common import Results, arguments, finish, measure, table
from embodied_rft.data import PAST, Past, Ragged
from embodied_rft.policy import build_policy
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.tokens.prefix_tree import computed, prefix_tree

SHAPES = ((4, 4, 24, 24), (4, 8, 24, 24), (8, 4, 24, 24), (8, 8, 24, 24), (8, 4, 8, 64), (6, 8, 64, 8))
QUICK = ((4, 4, 24, 24), (6, 4, 24, 24), (4, 8, 8, 64))
PICTURE = (64, 64, 3)
SPACE = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, PICTURE, np.uint8), "message": AnyText(10_000)})
MODEL = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 2048}


def make_policy(*, share: bool) -> Any:
    """The same random weights whatever `share`."""
    spec = {"id": "language", "model": {"tiny_vlm": MODEL}, "prompt": "plain", "share_prefix": share}
    return build_policy(spec, SPACE, AnyText(10_000), torch.Generator().manual_seed(0))


def conversations(
    policy: Any, turns: int, group: int, message: int, reply: int, rng: np.random.Generator
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """(observation, actions, trace) of a group: G T rows, the turns of an episode one after the other."""

    def text(length: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=length))

    first = rng.integers(256, size=PICTURE, dtype=np.uint8), text(2 * message)
    images: list[list[np.ndarray]] = []
    messages: list[str] = []
    said: list[str] = []
    index: list[np.ndarray] = []
    for _ in range(group):
        for turn in range(turns):
            shown = (rng.integers(256, size=PICTURE, dtype=np.uint8), text(message)) if turn else first
            images.append([shown[0]])
            messages.append(shown[1])
            index.append(np.arange(len(said) - turn, len(said)))
            said.append(text(reply - 1))
    trace = policy.retrace({}, said)
    seen = {"image": images, "message": messages}
    return {**seen, PAST: Past(Ragged.of(index, dtype=np.int64), seen, said, trace)}, said, trace


def steps_per_second(policy: Any, batch: tuple[dict[str, Any], list[str], dict[str, Any]]) -> float:
    """Forward and backward passes a second, from one; conversations are put together in it."""
    policy.zero_grad(set_to_none=True)
    start = time.perf_counter()
    log_prob, _ = policy.log_prob(*batch)
    log_prob.sum().backward()
    return 1 / (time.perf_counter() - start)


def token_bound(policy: Any, batch: tuple[dict[str, Any], list[str], dict[str, Any]]) -> tuple[float, int]:
    """All tokens over distinct ones, and the distinct ones."""
    observation, _, trace = batch
    rows = computed(policy.prompt_ids(observation), trace["reply"])
    distinct = prefix_tree(rows).distinct
    return int(rows.lengths.sum()) / distinct, distinct


def main() -> None:
    """Measure, print."""
    options = arguments(__doc__)
    torch.set_num_threads(1)  # a neighbour on one core stalls all threads of a matrix product
    shared, dense = make_policy(share=True), make_policy(share=False)
    rng = np.random.default_rng(0)
    speedups, bounds, shares = {}, {}, {}
    results: Results = {}
    for turns, group, message, reply in QUICK if options.quick else SHAPES:
        batch = conversations(shared, turns, group, message, reply, rng)
        scores = measure(
            {
                "shared": functools.partial(steps_per_second, shared, batch),
                "dense": functools.partial(steps_per_second, dense, batch),
            },
            rounds=1 if options.quick else 5,
        )
        name = f"{turns}/{group}/{message}/{reply}"
        ratios = np.array(scores["shared"].rounds) / np.array(scores["dense"].rounds)
        bounds[name], distinct = token_bound(shared, batch)
        speedups[name] = float(np.median(ratios))
        shares[name] = speedups[name] / bounds[name]
        results |= {f"{name} shared": scores["shared"], f"{name} dense": scores["dense"]}
        print(
            f"{name:>12}: {distinct:,} distinct tokens, {speedups[name]:.2f} x dense, {shares[name]:.2f} of the bound"
        )
    table(results, unit="steps/s", title="turns/group/message/reply", digits=3)
    finish(
        name="vlm_turns",
        results=results,
        ratio=float(np.median(list(speedups.values()))),
        of_bound=float(np.median(list(shares.values()))),
        of_bound_min=min(shares.values()),
        bounds={k: round(v, 3) for k, v in bounds.items()},
        speedups={k: round(v, 3) for k, v in speedups.items()},
        shares={k: round(v, 3) for k, v in shares.items()},
    )


if __name__ == "__main__":
    main()
