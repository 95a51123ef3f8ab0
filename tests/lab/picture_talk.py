"""A toy of many turns that shows a picture and takes a text: name its colour. Its parser reads the last word."""

import gymnasium
import numpy as np

from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.turns.parsing import make_parser

ID = "toy/PictureTalk-v0"
COLOURS = ("r", "g", "b")


class PictureTalk(gymnasium.Env):
    """Three turns; reward 1 for each right name, -0.5 for an answer that names none; success: the last one is right.

    Args:
        rules: what the first message begins with.
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    parser = make_parser("words", words=(COLOURS,))

    def __init__(self, rules="Which colour?", render_mode=None):
        self.rules, self.render_mode = rules, render_mode
        picture = gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({"image": picture, "message": AnyText(1_000)})
        self.action_space = AnyText(1_000)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn, self.colour = 0, int(self.np_random.integers(3))
        self.shade = int(self.np_random.integers(100, 256))
        return self._observe(self.rules), {}

    def step(self, action):
        parsed = self.parser.parse(action)
        right = parsed.action == COLOURS[self.colour]
        self.turn, self.colour = self.turn + 1, int(self.np_random.integers(3))
        reward = -0.5 if parsed.invalid else float(right)
        return self._observe(f"turn {self.turn}"), reward, self.turn == 3, False, {"is_success": right}

    def _observe(self, message):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[..., self.colour] = self.shade
        return {"image": picture, "message": message}


if ID not in gymnasium.registry:
    gymnasium.register(id=ID, entry_point=PictureTalk)
