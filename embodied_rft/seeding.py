"""Who may start from which initial state: training and evaluation seeds never meet.

A Gymnasium seed fixes an episode's initial state. Seeds in [0, 2**31) are for training, seeds in [2**31, 2**32) for
evaluation, by contract: a training pool refuses an evaluation seed and the other way round, so an evaluation state can
never be trained on by accident.
"""

from __future__ import annotations

import numpy as np
import torch

from embodied_rft.names import UserError

FIRST_EVALUATION_SEED = 2**31


def evaluation_seed(index: int, *, sheet: int = 0) -> int:
    """Seed of episode `index` (0 <= index < 100_000) on evaluation sheet `sheet` (0 <= sheet < 20_000)."""
    if not (0 <= index < 100_000 and 0 <= sheet < 20_000):
        raise UserError(f"evaluation episode {index} of sheet {sheet} does not exist: index < 100000, sheet < 20000")
    return FIRST_EVALUATION_SEED + sheet * 100_000 + index


def held_out_index(seed: int, num_states: int) -> int:
    """Which of `num_states` held-out states an evaluation seed means, for environments that have a finite list.

    `num_states` successive episodes of a sheet meet each state once; sheet 1 begins in the middle of the list.
    """
    if seed < FIRST_EVALUATION_SEED or num_states < 1:
        raise UserError(f"seed {seed} and {num_states} states; expected an evaluation seed (>= 2**31) and a state")
    sheet, index = divmod(seed - FIRST_EVALUATION_SEED, 100_000)
    return (index + sheet * (num_states // 2)) % num_states


def evaluation_generator(*, sheet: int = 0) -> torch.Generator:
    """What a greedy policy draws from on a sheet (a diffusion policy's start noise), so that evaluations repeat."""
    return torch.Generator().manual_seed(evaluation_seed(0, sheet=sheet))


def training_seed(run_seed: int, stream: int, episode: int) -> int:
    """Seed of episode number `episode` of stream `stream` in a run: a hash, so that runs and streams do not meet."""
    state = np.random.SeedSequence(entropy=run_seed, spawn_key=(stream, episode)).generate_state(1, np.uint32)
    return int(state[0]) % FIRST_EVALUATION_SEED


def check_training_seeds(seeds: np.ndarray) -> None:
    """Raise ValueError if any seed belongs to evaluation."""
    bad = np.asarray(seeds)[np.asarray(seeds) >= FIRST_EVALUATION_SEED]
    if bad.size:
        raise UserError(
            f"seed {int(bad[0])} is reserved for evaluation (>= 2**31): training on an evaluation state would make "
            "every success rate meaningless. Use a seed below 2**31."
        )


def spawn_generator(run_seed: int, *key: int) -> np.random.Generator:
    """An independent NumPy generator for one purpose of a run, named by integers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=run_seed, spawn_key=key)))


def pack_generator(generator: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator as six words, uint64."""
    state = generator.bit_generator.state
    words = [state["state"][name] >> shift & (2**64 - 1) for name in ("state", "inc") for shift in (64, 0)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def unpack_generator(generator: np.random.Generator, packed: np.ndarray) -> None:
    """Put the six words of `pack_generator` back."""
    words = [int(word) for word in packed]
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": words[0] << 64 | words[1], "inc": words[2] << 64 | words[3]},
        "has_uint32": words[4],
        "uinteger": words[5],
    }
