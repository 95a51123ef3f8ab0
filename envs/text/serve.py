"""One-turn text tasks: a prompt is the observation, the reply is the action, a rule gives the reward, the episode ends.

A task (`text_tasks`) draws problems and names a rule; `TextEnv` serves it as one environment, `TextVectorEnv` as N,
with the same problem for the same seed. Boundary: strings in, strings out; knows no model and no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from embodied_rft.envs.serving import check_mask, spread_seeds
from embodied_rft.envs.text.rules import overlong_penalty
from embodied_rft.envs.text.tasks import TASKS, Listed, Problem, TextTask, is_held_out, space_of
from embodied_rft.names import UserError
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import FIRST_EVALUATION_SEED, held_out_index, pack_generator, unpack_generator

State = dict[str, np.ndarray]


class TextBatch:
    """N problems and their generators: what both kinds of environment share.

    Args:
        task: draws the problems.
        num_envs: N.
        max_chars: longest prompt and reply.
        overlong: (limit, margin) in characters: adds `overlong_penalty` to the reward; None: no.
        held_out: share of all prompts, chosen by their hash, that evaluation seeds (2**31 and above) show and other
            seeds never do. 0: both show all. None: the task's own.
        exclude: names of problems that nobody shows, as `initial_observations` names them.
    """

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
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}, expected at least 1")
        self.held_out: float = getattr(task, "held_out", 0.0) if held_out is None else held_out
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {held_out}, expected a share of the prompts: at least 0 and below 1")
        self.task, self.overlong = task, overlong
        self.listed = Listed(task, held_out=self.held_out, exclude=exclude)
        self.evaluates = np.zeros(num_envs, dtype=bool)
        self.generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self.problems: list[Problem | None] = [None] * num_envs
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

    def start(self, row: int, generator: np.random.Generator, seed: int | None) -> None:
        """A new problem from a generator that was made from `seed`; None: it goes on."""
        self.generators[row] = generator
        if seed is not None:
            self.evaluates[row] = seed >= FIRST_EVALUATION_SEED
        listed = self.listed.held_out
        if seed is not None and self.evaluates[row] and listed:
            self.draw(row, place=held_out_index(seed, len(listed)))
        else:
            self.draw(row)

    def draw(self, row: int, *, place: int = -1) -> None:
        """A new problem, of those that may be shown; `place`: in the list of held-out problems."""
        self.before[row], self.place[row] = pack_generator(self.generators[row]), place
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

    def judge(self, row: int, reply: Any) -> tuple[float, bool]:
        """Reward and success of a reply. Raises ValueError if it is no text."""
        problem = self.problems[row]
        if problem is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        if not isinstance(reply, str):
            raise UserError(f"the action of environment {row} is {reply!r:.60}; expected a text")
        reward = problem.score(reply)
        extra = 0.0
        if self.overlong is not None:
            limit, margin = self.overlong
            extra = float(overlong_penalty(len(reply), limit=limit, margin=margin))
        return reward + extra, reward == 1.0

    def prompt(self, row: int) -> str:
        """What is shown."""
        problem = self.problems[row]
        return "" if problem is None else problem.prompt

    def get_state(self) -> State:
        """Generators as they are and as they were before the current problems, which a restored batch draws again."""
        now = np.stack([pack_generator(generator) for generator in self.generators])
        shown = np.array([problem is not None for problem in self.problems])
        kept = {"rng_before": self.before, "evaluates": self.evaluates, "place": self.place}
        return {"rng": now, "shown": shown, **{name: value.copy() for name, value in kept.items()}}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue exactly from `get_state`."""
        if len(state["rng"]) != len(self.generators):
            raise UserError(f"the state is of {len(state['rng'])} environments, expected {len(self.generators)}")
        self.evaluates = np.array(state["evaluates"], dtype=bool)
        for row, generator in enumerate(self.generators):
            self.problems[row] = None
            if state["shown"][row]:
                unpack_generator(generator, state["rng_before"][row])
                self.draw(row, place=int(state["place"][row]) if "place" in state else -1)
            unpack_generator(generator, state["rng"][row])


class TextEnv(gymnasium.Env):
    """One problem an episode, one reply an episode; arguments as in `TextBatch`.

    The observation is {"prompt": text}, the action a text; info has "is_success" and, after the reply, "answer".
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(self, task: TextTask, *, render_mode: str | None = None, **options: Any) -> None:
        self.batch = TextBatch(task, num_envs=1, **options)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.batch.observation_space, self.batch.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """A new problem; the same seed gives the same one."""
        super().reset(seed=seed)
        self.batch.start(0, self.np_random, seed)
        return {"prompt": self.batch.prompt(0)}, {}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        """Judge the reply and end the episode."""
        reward, success = self.batch.judge(0, action)
        problem = self.batch.problems[0]
        assert problem is not None
        return {"prompt": problem.prompt}, reward, True, False, {"is_success": float(success), "answer": problem.answer}

    def render(self) -> str | None:
        """The prompt."""
        return self.batch.prompt(0) if self.render_mode == "ansi" else None

    @property
    def num_held_out_states(self) -> int | None:
        """See `TextBatch`."""
        return self.batch.num_held_out_states

    def initial_observations(self) -> dict[str, dict[str, str]] | None:
        """See `TextBatch`."""
        return self.batch.initial_observations()

    def get_state(self) -> State:
        """As in `TextVectorEnv`, with a leading 1."""
        return self.batch.get_state()

    def set_state(self, state: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Continue from `get_state`; gives the observation there."""
        self.batch.generators[0] = self.np_random
        self.batch.set_state(state)
        return {"prompt": self.batch.prompt(0)}


class TextVectorEnv(gymnasium.vector.VectorEnv):
    """N problems at a time. Other arguments as in `TextBatch`.

    Args:
        task: draws the problems.
        num_envs: N.
        autoreset_mode: NEXT_STEP (the step after a reply shows the next problem; its action is ignored) or DISABLED
            (the caller resets with `options={"reset_mask": mask}`).
        render_mode: None or "ansi".
        options: of `TextBatch`.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        task: TextTask,
        *,
        num_envs: int,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            raise UserError("autoreset_mode SAME_STEP is not supported; use NEXT_STEP or DISABLED")
        self.batch = TextBatch(task, num_envs=num_envs, **options)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = self.batch.observation_space, self.batch.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._done = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | np.ndarray | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """New problems everywhere, or where `options["reset_mask"]` [N] bool says; seed s means s, s+1, ..."""
        mask = (options or {}).get("reset_mask")
        rows = range(self.num_envs) if mask is None else np.flatnonzero(check_mask(mask, self.num_envs)).tolist()
        seeds = spread_seeds(seed, self.num_envs)
        for row in rows:
            seed = seeds[row]
            self.batch.start(row, self.batch.generators[row] if seed is None else seeding.np_random(seed)[0], seed)
        self._done[list(rows)] = False
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Judge N replies; info["is_success"] is float32 [N]."""
        if len(actions) != self.num_envs:
            raise UserError(f"{len(actions)} actions were given for {self.num_envs} environments")
        if self._done.any() and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gymnasium.error.ResetNeeded(
                f"environments {np.flatnonzero(self._done).tolist()} have ended and autoreset is disabled: call "
                'reset(options={"reset_mask": mask}) for them first'
            )
        reward, success, answered = np.zeros(self.num_envs), np.zeros(self.num_envs, np.float32), ~self._done
        for row in range(self.num_envs):
            if answered[row]:
                reward[row], success[row] = self.batch.judge(row, actions[row])
            else:
                self.batch.draw(row)
        self._done = answered.copy()
        info = {"is_success": success, "_is_success": answered}
        return self._observe(), reward, answered, np.zeros(self.num_envs, dtype=bool), info

    def _observe(self) -> dict[str, Any]:
        return {"prompt": tuple(self.batch.prompt(row) for row in range(self.num_envs))}

    @property
    def num_held_out_states(self) -> int | None:
        """See `TextBatch`."""
        return self.batch.num_held_out_states

    def initial_observations(self) -> dict[str, dict[str, str]] | None:
        """See `TextBatch`."""
        return self.batch.initial_observations()

    def get_state(self) -> State:
        """All that the future depends on, as arrays with leading N."""
        return {**self.batch.get_state(), "done": self._done.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Continue exactly from `get_state`; gives the observation there."""
        self.batch.set_state(state)
        self._done = np.array(state["done"], dtype=bool)
        return self._observe()


BATCH = ("max_chars", "overlong", "held_out", "exclude")  # options of `TextBatch`; all others are the task's


def make_env(task: str, *, render_mode: str | None = None, **options: Any) -> TextEnv:
    """An environment of a task by name: options of the batch go there, all others to the task."""
    batch = {key: options.pop(key) for key in BATCH if key in options}
    return TextEnv(TASKS[task](**options), render_mode=render_mode, **batch)


def make_vector_env(task: str, *, num_envs: int, **options: Any) -> TextVectorEnv:
    """As `make_env`, N of them."""
    keys = (*BATCH, "autoreset_mode", "render_mode")
    batch = {key: options.pop(key) for key in keys if key in options}
    return TextVectorEnv(TASKS[task](**options), num_envs=num_envs, **batch)


def describe(task: str) -> str:
    """One line about a task."""
    return (TASKS[task].__doc__ or "").partition("\n")[0]


def option_sources(task: str) -> tuple[Any, ...]:
    """Whose arguments a text environment's options are."""
    return TASKS[task], TextBatch


setattr(make_env, "option_sources", option_sources)  # noqa: B010
setattr(make_env, "describe", describe)  # noqa: B010  (a function with an attribute, said so that mypy agrees)
for _name, _task in zip(("Sum", "Countdown", "Format", "Jsonl"), TASKS, strict=True):
    gymnasium.register(
        id=f"embodied_rft/Text{_name}-v0",
        entry_point="embodied_rft.envs.text.serve:make_env",
        vector_entry_point="embodied_rft.envs.text.serve:make_vector_env",
        kwargs={"task": _task},
    )
