"""Games of the Atari 2600 (Bellemare et al. 2013, arXiv:1207.4708; Machado et al. 2018, arXiv:1709.06009), of ale-py.

Pictures and actions with names, as the emulator has them. Rewards are the game's, not clipped. A seed fixes the
emulator's dice (sticky actions) and how many frames pass before the first decision (at most `wait`; Mnih et al. 2015).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from embodied_rft.envs.games.batch import Description
from embodied_rft.envs.worlds.world import World, need
from embodied_rft.names import UserError, nearest

SIDES = ("UP", "DOWN", "LEFT", "RIGHT")  # what long names are made of: "UPRIGHTFIRE"


class Arcade(World[int]):
    """A game of the Atari 2600, of the package ale-py.

    Args:
        game: "Pong", "Breakout" and 102 others.
        frameskip: frames of a decision.
        sticky: probability that the emulator repeats the action of before, in each frame.
        wait: longest wait before the first decision, in decisions.
        size: pixels of the picture on a side; None: 210 x 160, as the game draws it.
        goal: score that is called success when the episode ends; None: nothing is.
        length: decisions of an episode; None: until the game is over.
        render_mode: None, "rgb_array" or "ansi".
    """

    def __init__(
        self,
        *,
        game: str = "Pong",
        frameskip: int = 4,
        sticky: float = 0.25,
        wait: int = 30,
        size: int | None = None,
        goal: float | None = None,
        length: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        package = need("ale_py", "ale-py")
        package.ALEInterface.setLoggerMode(package.LoggerMode.Error)  # it prints who it is
        if frameskip < 1 or wait < 0 or not 0 <= sticky < 1:
            raise UserError(f"frameskip is {frameskip}, wait {wait}, sticky {sticky}; expected >= 1, >= 0, in [0, 1)")
        if (size is not None and size < 8) or (length is not None and length < 1):
            raise UserError(f"size is {size} and length {length}; expected at least 8 and 1, or null")
        self.game, self.size, self.goal, self.length, self.wait = game, size, goal, length, wait
        self.inner = _make(game, frameskip=frameskip, repeat_action_probability=sticky)
        self.words = (tuple(_word(name) for name in self.inner.get_action_meanings()),)
        shape = self.inner.observation_space.shape if size is None else (size, size, 3)
        shown = {"image": spaces.Box(0, 255, shape, np.uint8)}
        super().__init__(shown, spaces.Discrete(len(self.words[0])), render_mode=render_mode)

    def begin(self, start: int) -> None:
        """A new game, after a wait of 0 to `wait` decisions."""
        self.seen, info = self.inner.reset(seed=start)
        self.score, self.steps, self.lives = 0.0, 0, int(info["lives"])
        self.counts_lives = self.lives > 0
        for _ in range(int(np.random.default_rng(start).integers(self.wait + 1))):
            self.seen, _, over, *_ = self.inner.step(0)
            if over:
                self.seen, _ = self.inner.reset()

    def advance(self, action: int) -> tuple[float, bool, bool, dict[str, Any]]:
        """One decision; info tells the score and the lives."""
        self.seen, reward, terminated, truncated, info = self.inner.step(action)
        self.score, self.steps, self.lives = self.score + float(reward), self.steps + 1, int(info["lives"])
        told: dict[str, Any] = {"score": self.score, "lives": self.lives}
        if self.goal is not None:
            told["is_success"] = float(self.score >= self.goal)
        late = self.length is not None and self.steps >= self.length
        return float(reward), bool(terminated), bool((truncated or late) and not terminated), told

    def observe(self) -> dict[str, np.ndarray]:
        """The picture."""
        return {"image": self.picture()}

    def picture(self) -> np.ndarray:
        """The screen."""
        if self.size is None:
            return np.asarray(self.seen, np.uint8)
        cv2 = need("cv2", "opencv-python-headless")
        return np.asarray(cv2.resize(self.seen, (self.size, self.size), interpolation=cv2.INTER_AREA), np.uint8)

    def describe(self) -> Description:
        """Score and lives; whatever else there is to know, the picture shows."""
        rules = f"You play {self.game} on an Atari 2600; the picture shows the screen. Make as many points as you can."
        lives = f", lives: {self.lives}" if self.counts_lives else ""
        return Description(rules, f"Score: {self.score:g}{lives}", self.words, self.words[0])


def _make(game: str, **options: Any) -> Any:
    import gymnasium

    games = [id[4:-3] for id in gymnasium.registry if id.startswith("ALE/") and id.endswith("-v5")]
    if game not in games:
        raise UserError(f"unknown game {game!r}; {nearest(game, games)}")
    return gymnasium.make(f"ALE/{game}-v5", disable_env_checker=True, **options).unwrapped


def _word(name: str) -> str:
    """An action's name as one would say it: of "UPRIGHTFIRE" "up right and fire", of "NOOP" "wait"."""
    if name == "NOOP":
        return "wait"
    sides, fires = name.removesuffix("FIRE"), name.endswith("FIRE")
    said = [side.lower() for side in SIDES if side in sides]
    return " and ".join([" ".join(said)] * bool(said) + ["fire"] * fires)
