"""One-turn text tasks: a prompt is the observation, the reply is the action, a rule gives the reward, the episode ends.

A task draws problems and names a rule; `TextEnv` serves it as one environment, `TextVectorEnv` as N, with the same
problem for the same seed. Boundary: strings in, strings out; knows no model and no tokens.
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from embodied_rft.envs.batched import check_mask, spread_seeds
from embodied_rft.envs.text_rewards import make_rule, overlong_penalty
from embodied_rft.seeding import FIRST_EVALUATION_SEED

State = dict[str, np.ndarray]


class AnyText(spaces.Text):
    """Any string of at most `max_length` characters: models write whatever they like. Samples are ASCII."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length, min_length=0, charset=string.ascii_letters + string.digits + " +-*/=.,")

    def contains(self, x: Any) -> bool:
        """Whether it is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length


class Problem(NamedTuple):
    """Problem("3+4=", "7", numeric): what is shown, what is right, and who judges."""

    prompt: str
    answer: str
    judge: Callable[[str, str], float]


class TextTask(Protocol):
    """Where problems come from; an attribute `held_out` is the default of the option of that name."""

    def draw(self, rng: np.random.Generator) -> Problem:
        """One problem; all its randomness is from `rng`."""


class SumTask:
    """Add integers: "3+4=" -> "7".

    Args:
        digits: largest number of digits of a term.
        num_terms: terms of a sum.
        template: of the prompt; {sum} is replaced.
        rule: who judges, see `text_rewards`.
    """

    def __init__(
        self,
        *,
        digits: int = 1,
        num_terms: int = 2,
        template: str = "{sum}=",
        rule: str | Mapping[str, Any] = "numeric",
    ) -> None:
        if digits < 1 or num_terms < 2:
            raise ValueError(f"digits is {digits} and num_terms {num_terms}; expected at least 1 and 2")
        self.high, self.num_terms, self.template, self.judge = 10**digits, num_terms, template, make_rule(rule)

    def draw(self, rng: np.random.Generator) -> Problem:
        """Terms uniform in [0, 10**digits)."""
        terms = rng.integers(self.high, size=self.num_terms)
        prompt = self.template.replace("{sum}", "+".join(map(str, terms)))
        return Problem(prompt, str(terms.sum()), self.judge)


class CountdownTask:
    """Reach a target with given numbers and + - * /, each number at most once. Every problem has a solution.

    Args:
        num_numbers: how many numbers are given.
        largest: largest of them.
    """

    def __init__(self, *, num_numbers: int = 3, largest: int = 20) -> None:
        if num_numbers < 2 or largest < 2:
            raise ValueError(f"num_numbers is {num_numbers} and largest {largest}; expected at least 2 each")
        self.num_numbers, self.largest, self.judge = num_numbers, largest, make_rule("countdown")

    def draw(self, rng: np.random.Generator) -> Problem:
        """The target is the value of a random expression of all numbers, an integer above 0."""
        while True:
            numbers = [int(n) for n in rng.integers(1, self.largest + 1, size=self.num_numbers)]
            value = numbers[0]
            for number in numbers[1:]:
                value = [value + number, value - number, value * number][int(rng.integers(3))]
            if 0 < value <= self.largest**2:
                break
        shown = [numbers[i] for i in rng.permutation(self.num_numbers)]
        prompt = f"Use {', '.join(map(str, shown))} and + - * / to make {value}. Reply with the expression only."
        return Problem(prompt, json.dumps({"numbers": shown, "target": value}), self.judge)


class FormatTask:
    """Follow a form exactly: so many words or numbers, upper or lower case, this separator."""

    WORDS = ("red", "blue", "green", "one", "two", "sun", "moon", "tree", "car", "door")

    def __init__(self, *, largest: int = 4) -> None:
        if largest < 1:
            raise ValueError(f"largest is {largest}; expected at least 1 item")
        self.largest, self.judge = largest, make_rule("regex")

    def draw(self, rng: np.random.Generator) -> Problem:
        """One of three kinds of item, 1 to `largest` of them, one of three separators."""
        kinds = (
            ("lower-case words", r"[a-z]+"),
            ("upper-case words", r"[A-Z]+"),
            ("numbers", r"[0-9]+"),
        )
        separators = (("commas", ","), ("semicolons", ";"), ("dashes", "-"))
        (item, pattern), (name, separator) = kinds[int(rng.integers(3))], separators[int(rng.integers(3))]
        count = int(rng.integers(1, self.largest + 1))
        prompt = f"Write exactly {count} {item} separated by {name}, without spaces."
        return Problem(prompt, separator.join([pattern] * count), self.judge)


class JsonlTask:
    """Problems from a local file, one JSON object a line: {"prompt": ..., "answer": ..., "checker": "numeric"}.

    Args:
        path: the file, UTF-8.
        checker: rule for lines without one.

    A tenth of the prompts is held out for evaluation, unless `held_out` says otherwise.

    Raises:
        ValueError: with the line's number, when the file is missing, empty, or a line is not as above.
    """

    held_out = 0.1

    def __init__(self, *, path: str | Path, checker: str | Mapping[str, Any] = "exact") -> None:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"the problem file {str(path)!r} does not exist")
        self.problems = []
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a text
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is no UTF-8 text ({error}): save it so, one JSON object a line") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    self.problems.append(_problem(line, checker))
                except ValueError as error:
                    raise ValueError(f"{file.name}, line {number}: {error}") from None
        if not self.problems:
            raise ValueError(f'{file.name} holds no problem; expected lines like {{"prompt": "3+4=", "answer": "7"}}')

    def draw(self, rng: np.random.Generator) -> Problem:
        """One line, uniformly."""
        return self.problems[int(rng.integers(len(self.problems)))]


def _problem(line: str, checker: str | Mapping[str, Any]) -> Problem:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error}): {line[:60]!r}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected an object with a prompt and an answer, found {line[:60]!r}")
    unknown = set(content) - {"prompt", "answer", "checker"}
    missing = {"prompt", "answer"} - set(content)
    if unknown or missing:
        what = f"unknown key {min(unknown)!r}" if unknown else f"no key {min(missing)!r}"
        raise ValueError(f'{what}; expected "prompt", "answer" and, if you like, "checker"')
    prompt, answer = content["prompt"], content["answer"]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"the prompt is {prompt!r}; expected a text that is not empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer is {answer!r}; expected a text or a number")
    judge = make_rule(content.get("checker", checker))
    judge("", str(answer))  # an answer that the rule cannot read is found now, not in the middle of a run
    return Problem(prompt, str(answer), judge)


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt is one of those that only evaluation shows; the same on every machine."""
    return zlib.crc32(prompt.encode()) < share * 2**32


class TextBatch:
    """N problems and their generators: what both kinds of environment share.

    Args:
        task: draws the problems.
        num_envs: N.
        max_chars: longest prompt and reply.
        overlong: (limit, margin) in characters: adds `overlong_penalty` to the reward; None: no.
        held_out: share of all prompts, chosen by their hash, that evaluation seeds (2**31 and above) show and other
            seeds never do. 0: both show all. None: the task's own.
    """

    def __init__(
        self,
        task: TextTask,
        *,
        num_envs: int,
        max_chars: int = 65_536,
        overlong: tuple[int, int] | None = None,
        held_out: float | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, expected at least 1")
        self.held_out: float = getattr(task, "held_out", 0.0) if held_out is None else held_out
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {held_out}, expected a share of the prompts: at least 0 and below 1")
        self.task, self.overlong = task, overlong
        self.evaluates = np.zeros(num_envs, dtype=bool)
        self.generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self.problems: list[Problem | None] = [None] * num_envs
        self.before = np.zeros((num_envs, 6), dtype=np.uint64)  # the generators before they drew the problems
        self.observation_space = spaces.Dict({"prompt": AnyText(max_chars)})
        self.action_space = AnyText(max_chars)

    def start(self, row: int, generator: np.random.Generator, seed: int | None) -> None:
        """A new problem from a generator that was made from `seed`; None: it goes on."""
        self.generators[row] = generator
        if seed is not None:
            self.evaluates[row] = seed >= FIRST_EVALUATION_SEED
        self.draw(row)

    def draw(self, row: int) -> None:
        """A new problem, of those that may be shown."""
        self.before[row] = pack_generator(self.generators[row])
        for _ in range(10_000):
            problem = self.task.draw(self.generators[row])
            if not self.held_out or is_held_out(problem.prompt, self.held_out) == self.evaluates[row]:
                self.problems[row] = problem
                return
        raise ValueError(
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
            raise ValueError(f"the action of environment {row} is {reply!r:.60}; expected a text")
        reward = float(problem.judge(reply, problem.answer))
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
        return {"rng": now, "rng_before": self.before.copy(), "shown": shown, "evaluates": self.evaluates.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue exactly from `get_state`."""
        if len(state["rng"]) != len(self.generators):
            raise ValueError(f"the state is of {len(state['rng'])} environments, expected {len(self.generators)}")
        self.evaluates = np.array(state["evaluates"], dtype=bool)
        for row, generator in enumerate(self.generators):
            self.problems[row] = None
            if state["shown"][row]:
                unpack_generator(generator, state["rng_before"][row])
                self.draw(row)
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
            raise ValueError("autoreset_mode SAME_STEP is not supported; use NEXT_STEP or DISABLED")
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
            raise ValueError(f"{len(actions)} actions were given for {self.num_envs} environments")
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

    def get_state(self) -> State:
        """All that the future depends on, as arrays with leading N."""
        return {**self.batch.get_state(), "done": self._done.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Continue exactly from `get_state`; gives the observation there."""
        self.batch.set_state(state)
        self._done = np.array(state["done"], dtype=bool)
        return self._observe()


TASKS: dict[str, Callable[..., TextTask]] = {
    "sum": SumTask,
    "countdown": CountdownTask,
    "format": FormatTask,
    "jsonl": JsonlTask,
}


def make_env(task: str, *, render_mode: str | None = None, **options: Any) -> TextEnv:
    """An environment of a task by name: options of the batch go there, all others to the task."""
    batch = {key: options.pop(key) for key in ("max_chars", "overlong", "held_out") if key in options}
    return TextEnv(TASKS[task](**options), render_mode=render_mode, **batch)


def make_vector_env(task: str, *, num_envs: int, **options: Any) -> TextVectorEnv:
    """As `make_env`, N of them."""
    keys = ("max_chars", "overlong", "held_out", "autoreset_mode", "render_mode")
    batch = {key: options.pop(key) for key in keys if key in options}
    return TextVectorEnv(TASKS[task](**options), num_envs=num_envs, **batch)


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


def describe(task: str) -> str:
    """One line about a task."""
    return (TASKS[task].__doc__ or "").partition("\n")[0]


setattr(make_env, "describe", describe)  # noqa: B010  (a function with an attribute, said so that mypy agrees)
for _name, _task in zip(("Sum", "Countdown", "Format", "Jsonl"), TASKS, strict=True):
    gymnasium.register(
        id=f"embodied_rft/Text{_name}-v0",
        entry_point="embodied_rft.envs.text:make_env",
        vector_entry_point="embodied_rft.envs.text:make_vector_env",
        kwargs={"task": _task},
    )
