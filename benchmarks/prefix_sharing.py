"""Forward and backward pass of groups of replies: each prompt computed once, against the dense padded batch.

One group of G replies of C tokens after a prompt of P tokens, on a random Qwen2-type model of 3.5 M parameters (4
layers, width 256, vocabulary 2048). The bound is the ratio of tokens through the linear layers, G (P + C) / (P + G C);
attention to the prompt is not saved. `of_bound` is the median share of it, `of_bound_min` the smallest over the
shapes. A further row shows the peak memory of the chunked token loss against plain log-softmax.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.common import Results, arguments, finish, measure, table
from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm
from embodied_rft.data import Ragged
from embodied_rft.tokens.decoder import Decoder
from embodied_rft.tokens.log_probs import Head, plain_token_log_probs, token_log_probs
from embodied_rft.tokens.prefix import reply_states

SHAPES = ((128, 64, 8), (512, 64, 8), (1024, 64, 8), (512, 32, 16), (1024, 16, 8), (256, 256, 8), (64, 256, 8))
QUICK = ((128, 64, 8), (512, 64, 8), (1024, 16, 8), (64, 256, 8))
LAYERS = 4


def steps_per_second(model: torch.nn.Module, prompts: Ragged, replies: Ragged, *, share: bool) -> float:
    """Forward and backward passes a second, from one."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    states = reply_states(Decoder(model.model), prompts, replies, share=share)
    log_prob, _ = token_log_probs(states, torch.from_numpy(replies.values), Head(model.lm_head.weight))  # type: ignore
    log_prob.mean().backward()
    return 1 / (time.perf_counter() - start)


def peak_megabytes(chunked: bool, tokens: int, vocabulary: int) -> float:
    """How much the peak memory of a fresh process grows with one forward and backward pass of the token loss."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grow, chunked, tokens, vocabulary).result()


def _grow(chunked: bool, tokens: int, vocabulary: int) -> float:
    hidden = torch.randn(tokens, 256, requires_grad=True)
    head = Head(torch.randn(vocabulary, 256, requires_grad=True))
    targets = torch.randint(vocabulary, (tokens,))
    function = token_log_probs if chunked else plain_token_log_probs
    function(hidden[:8], targets[:8], head)[0].sum().backward()
    before = peak_rss()
    function(hidden, targets, head)[0].sum().backward()
    return peak_rss() - before


def peak_rss() -> float:
    """Largest resident memory of this process so far, MB (ru_maxrss would include the parent's)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)  # a neighbour on one core stalls all threads of a matrix product
    config = TinyConfig(hidden_size=256, num_layers=LAYERS, num_heads=8, num_kv_heads=4, vocab_size=2048)
    model, _ = tiny_causal_lm(config, rng=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    speedups, shares = {}, {}
    results: Results = {}
    for prompt_length, reply_length, group in QUICK if options.quick else SHAPES:
        replies = Ragged.of(list(rng.integers(2048, size=(group, reply_length))))
        prompts = Ragged.of([rng.integers(2048, size=prompt_length)] * group)
        scores = measure(
            {
                "shared": functools.partial(steps_per_second, model, prompts, replies, share=True),
                "dense": functools.partial(steps_per_second, model, prompts, replies, share=False),
            },
            rounds=2 if options.quick else 7,
        )
        name = f"{prompt_length}/{reply_length}/{group}"
        ratios = np.array(scores["shared"].rounds) / np.array(scores["dense"].rounds)
        bound = group * (prompt_length + reply_length) / (prompt_length + group * reply_length)
        speedups[name], shares[name] = float(np.median(ratios)), float(np.median(ratios)) / bound
        results |= {f"{name} shared": scores["shared"], f"{name} dense": scores["dense"]}
    table(results, unit="steps/s", title="prompt/reply/group", digits=2)
    size = (4096, 32_768)
    chunked, plain = (peak_megabytes(flag, *size) for flag in (True, False))
    print(f"token loss, {size[0]} tokens, vocabulary {size[1]}: {chunked:.0f} MB at most, plain {plain:.0f} MB")
    for name in speedups:
        print(f"{name:>12}: {speedups[name]:.2f} x dense, {shares[name]:.2f} of the bound")
    finish(
        name="prefix_sharing",
        results=results,
        ratio=float(np.median(list(speedups.values()))),
        of_bound=float(np.median(list(shares.values()))),
        of_bound_min=min(shares.values()),
        speedups={k: round(v, 3) for k, v in speedups.items()},
        shares={k: round(v, 3) for k, v in shares.items()},
        token_loss_memory_ratio=plain / chunked,
    )


if __name__ == "__main__":
    main()
