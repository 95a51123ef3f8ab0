"""One-turn text tasks: a prompt is the observation, the reply is the action, a rule gives the reward, the episode ends.

A task (tasks.py) draws problems and names a rule; `serving` makes Gymnasium environments of a batch. The observation is
{"prompt": text}, the action a text. Boundary: strings in, strings out; knows no model and no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from embodied_rft.envs.serving import EnvBatch, Outcome
from embodied_rft.envs.text.rules import overlong_penalty
from embodied_rft.envs.text.tasks import Listed, Problem, TextTask, is_held_out, space_of
from embodied_rft.names import UserError
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import FIRST_EVALUATION_SEED, held_out_index, pack_generator, unpack_generator


class TextBatch(EnvBatch):
    """N problems, one reply each; the same seed shows the same problem.

    Args:
        task: draws the problems.
        num_envs: N.
        max_chars: longest prompt and reply.
        overlong: (limit, margin) in characters: adds `overlong_penalty` to the reward; None: no.
        held_out: share of all prompts, chosen by their hash, that evaluation seeds (2**31 and above) show and other
            seeds never do. 0: both show all. None: the task's own.
        exclude: names of problems that nobody shows, as `initial_observations` names them.
    """

    arrays: tuple[str, ...] = ("evaluates", "place", "before", "shown")
    one_decision: ClassVar[bool] = True
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        task: TextTask,
        *,
        num_envs: int,
        max_chars: int = 65_536,
        overlong: tuple[int, int] | None = None,
        held_out: float | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(num_envs=num_envs)
        self.held_out: float = getattr(task, "held_out", 0.0) if held_out is None else held_out
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {held_out}, expected a share of the prompts: at least 0 and below 1")
        self.task, self.overlong = task, overlong
        self.listed = Listed(task, held_out=self.held_out, exclude=exclude)
        self.problems: list[Problem | None] = [None] * num_envs
        self.evaluates = np.zeros(num_envs, dtype=bool)
        self.shown = np.zeros(num_envs, dtype=bool)  # there is a problem, drawn as the next two say
        self.place = np.full(num_envs, -1, dtype=np.int64)  # in the list of held-out problems; -1: drawn at random
        self.before = np.zeros((num_envs, 6), dtype=np.uint64)  # the generators before they drew the problems
        self.observation_space = spaces.Dict({"prompt": space_of(task)(max_chars)})
        self.action_space = AnyText(max_chars)

    @property
    def num_held_out_states(self) -> int | None:
        """How many distinct problems evaluation can show; None: the task cannot name them all."""
        return None if self.listed.held_out is None else len(self.listed.held_out)

    def initial_observations(self) -> dict[str, dict[str, str]] | None:
        """Everything that an episode can begin with, by a name for messages; None: the task cannot name it all."""
        return None if self.listed.all is None else {p.label: {"prompt": p.prompt} for p in self.listed.all}

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New problems: of an evaluation seed the held-out one that it means, where the task can list them."""
        listed = self.listed.held_out
        for row, seed in zip(rows.tolist(), seeds):
            if seed is not None:
                self.evaluates[row] = seed >= FIRST_EVALUATION_SEED
            if seed is not None and self.evaluates[row] and listed:
                self.draw(row, place=held_out_index(seed, len(listed)))
            else:
                self.draw(row)

    def draw(self, row: int, *, place: int = -1) -> None:
        """A new problem, of those that may be shown; `place`: in the list of held-out problems."""
        self.before[row], self.place[row], self.shown[row] = pack_generator(self.generators[row]), place, True
        if place >= 0:
            assert self.listed.held_out is not None
            self.problems[row] = self.listed.held_out[place]
            return
        for _ in range(10_000):
            problem = self.task.draw(self.generators[row])
            fits = not self.held_out or is_held_out(problem.prompt, self.held_out) == self.evaluates[row]
            if fits and problem.label not in self.listed.exclude:
                self.problems[row] = problem
                return
        raise UserError(
            f"no prompt {'is held out' if self.evaluates[row] else 'is left for training'} with held_out "
            f"{self.held_out} (10,000 were drawn): add problems, change the share, or set held_out: 0 to show the same "
            "ones in training and evaluation"
        )

    def step(self, rows: np.ndarray, actions: Sequence[str]) -> Outcome:
        """Judge the replies; every episode ends with its first."""
        judged = [self.judge(row, reply) for row, reply in zip(rows.tolist(), actions)]
        reward, success = (np.array(column) for column in zip(*judged))
        return Outcome(reward, np.ones(len(rows), dtype=bool), success)

    def judge(self, row: int, reply: str) -> tuple[float, bool]:
        """Reward and success of a reply."""
        problem, extra = self.problems[row], 0.0
        assert problem is not None
        reward = problem.score(reply)
        if self.overlong is not None:
            limit, margin = self.overlong
            extra = float(overlong_penalty(len(reply), limit=limit, margin=margin))
        return reward + extra, reward == 1.0

    def observe(self, rows: np.ndarray) -> dict[str, tuple[str, ...]]:
        """The prompts."""
        return {"prompt": tuple("" if problem is None else problem.prompt for problem in self.problems)}

    def render(self, row: int, mode: str) -> str | None:
        """The prompt."""
        return self.observe(np.array([row]))["prompt"][row] if mode == "ansi" else None

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue exactly from `get_state`: the problems are drawn again, from the generators as they were before."""
        super().set_state(state)
        for row, generator in enumerate(self.generators):
            self.problems[row] = None
            if self.shown[row]:
                unpack_generator(generator, self.before[row])
                self.draw(row, place=int(self.place[row]))
