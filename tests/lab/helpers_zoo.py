"""A zoo of misbehaviour: one environment that does, in the second step of an episode, what its seed says."""

import sys
import time

import gymnasium
import numpy as np
from gymnasium import spaces

FIRST = 1000  # the seed of the first trouble
HEALTHY = 5  # a seed of none


class Unwell(BaseException):
    """Not even an Exception."""


def _raise(error):
    raise error


def _assert():
    assert 1 + 1 == 3


ANSWERS = {  # which of (observation, reward, terminated, truncated, info) is what instead: name -> (place, value)
    "reward_none": (1, None),
    "reward_string": (1, "1.0"),
    "reward_vector": (1, np.ones(2)),
    "reward_complex": (1, 1j),
    "reward_nan": (1, float("nan")),
    "reward_too_large": (1, 1e39),
    "shape": (0, np.zeros(3, np.float32)),
    "scalar": (0, 0.5),
    "dtype": (0, np.array(["a", "b"])),
    "ragged": (0, [[1.0], [1.0, 2.0]]),
    "nothing": (0, None),
    "nan": (0, np.array([np.nan, 0.0])),
    "too_large": (0, np.array([1e39, 0.0])),
    "terminated_none": (2, None),
    "truncated_word": (3, "no"),
    "info_none": (4, None),
    "success_nan": (4, {"success": float("nan")}),
    "success_word": (4, {"success": "no"}),
    "success_none": (4, {"is_success": None}),
    "success_share": (4, {"success": 0.7}),
    "success_vector": (4, {"success": np.array([True, False])}),
}
ACTS = {
    "raise": lambda: _raise(ArithmeticError("the motor burnt out")),
    "assert": _assert,
    "exit": lambda: sys.exit(0),
    "base": lambda: _raise(Unwell("unwell")),
    "stop_iteration": lambda: _raise(StopIteration()),
    "hang": lambda: time.sleep(600),
}
SAID = {  # what the incident must say
    "raise": "ArithmeticError: the motor burnt out",
    "assert": "assert 1 + 1 == 3",
    "exit": "SystemExit: 0",
    "base": "Unwell",
    "stop_iteration": "StopIteration",
    "hang": "no answer within",
    "four_values": "step returned 4 values",
    "exit_reset": "SystemExit: 3",
    "reset_alone": "reset returned one ndarray",
    "reward_none": "the reward is None",
    "reward_string": "the reward is '1.0'",
    "reward_vector": "the reward is an array",
    "reward_nan": "reward is NaN or infinite",
    "reward_too_large": "reward is NaN or infinite",
    "shape": "an array float32 (3,)",
    "nan": "'observation' is NaN or infinite",
    "too_large": "'observation' is NaN or infinite",
    "terminated_none": "terminated is None",
    "truncated_word": "truncated is 'no'",
    "info_none": "info is None",
    "success_nan": "info['success'] is nan",
    "success_word": "info['success'] is 'no'",
    "success_none": "info['is_success'] is None",
    "success_share": "info['success'] is 0.7",
}
TROUBLES = ("four_values", "exit_reset", "reset_alone", *ANSWERS, *ACTS)


class Zoo(gymnasium.Env):
    """State [2] float64; success in every episode of six steps.

    Args:
        always: the trouble of every episode, whatever the seed.
        share: of the episodes that are in some trouble (never a hang), chosen by their seed.
    """

    def __init__(self, *, always: str = "", share: float = 0.0):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.always, self.share, self.trouble, self.steps = always, share, "", 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.trouble = 0, self.always
        if seed is not None and FIRST <= seed < FIRST + len(TROUBLES):
            self.trouble = TROUBLES[seed - FIRST]
        elif self.np_random.random() < self.share:
            self.trouble = str(self.np_random.choice([t for t in TROUBLES if t != "hang"]))
        self.state = self.np_random.normal(size=2)
        if self.trouble == "exit_reset":
            sys.exit(3)
        return self.state.copy() if self.trouble == "reset_alone" else (self.state.copy(), {})

    def step(self, action):
        self.steps += 1
        self.state = self.state + 0.1 * float(action[0])
        action[:] = 99.0  # environments write into what they are given
        over = self.steps >= 6
        said = [self.state.copy(), 1.0, False, over, {"success": True} if over else {}]
        if self.steps == 2 and self.trouble:
            if self.trouble == "four_values":
                return tuple(said[:4])
            if self.trouble in ANSWERS:
                place, value = ANSWERS[self.trouble]
                said[place] = value
            elif self.trouble in ACTS:
                ACTS[self.trouble]()
        return tuple(said)


if "Zoo-v0" not in gymnasium.registry:
    gymnasium.register("Zoo-v0", entry_point="tests.lab.helpers_zoo:Zoo")
