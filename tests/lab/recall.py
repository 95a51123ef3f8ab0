"""A toy of three turns: a cue is given in the first one, asked for in the last one, and nothing is said of it between.

An answer is right if it is odd where the cue is: the sum of its characters' numbers, so that a model that has never
learned to write is right in half of its episodes. The cue is a letter or the shade of a picture.
"""

import numpy as np
from gymnasium import spaces

from embodied_rft.envs.serving import EnvBatch, Outcome, serve
from embodied_rft.pools.text_spaces import AnyText

TURNS = ("{cue}", "-", "?")
SIDE = 16  # pixels of a picture


class Recall(EnvBatch):
    """N conversations.

    Args:
        num_envs: N.
        drawn: the cue is a picture, black in later turns; else it is a letter.
    """

    arrays = ("cue", "turn")

    def __init__(self, *, num_envs, drawn=False):
        super().__init__(num_envs=num_envs)
        self.cue, self.turn, self.drawn = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64), drawn
        picture = {"image": spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)} if drawn else {}
        self.observation_space = spaces.Dict({**picture, "message": AnyText(99)})
        self.action_space = AnyText(99)

    def start(self, rows, seeds, options):
        self.turn[rows] = 0
        self.cue[rows] = [self.generators[row].integers(2) for row in rows]

    def step(self, rows, actions):
        self.turn[rows] += 1
        over = self.turn[rows] == len(TURNS)
        right = np.array([sum(map(ord, answer)) % 2 for answer in actions]) == self.cue[rows]
        return Outcome((over & right).astype(float), over, over & right)

    def observe(self, rows):
        turn = np.minimum(self.turn, len(TURNS) - 1)
        cues = ["" if self.drawn else "AB"[cue] for cue in self.cue]
        seen = {"message": tuple(TURNS[t].format(cue=cue) for t, cue in zip(turn, cues, strict=True))}
        if self.drawn:
            shade = np.where(turn == 0, 100 + 155 * self.cue, 0).astype(np.uint8)
            seen["image"] = np.broadcast_to(shade[:, None, None, None], (self.num_envs, SIDE, SIDE, 3)).copy()
        return seen


serve("toy/Recall-v0", Recall)
