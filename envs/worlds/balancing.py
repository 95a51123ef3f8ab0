"""Who holds the pole of Gymnasium's CartPole (Barto, Sutton and Anderson 1983): demonstrations for cold starts.

Boundary: a rule of four numbers; the environment is the package's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from embodied_rft.options import check_share
from embodied_rft.registry import register

GAINS = np.array([0.1, 0.2, 1.0, 0.4])  # of place, speed, angle and angular speed: push to where the pole falls


@register("demonstrator", "cart_pole", "CartPole-v1")
class Balancer:
    """Pushes to where the pole falls, and the cart back to the middle.

    Args:
        noise: share of pushes that are drawn at random, in [0, 1].
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        self.noise = check_share("noise", noise, "pushes drawn at random")

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Actions [N]: 0 to the left, 1 to the right."""
        action = (np.asarray(observation["observation"], np.float64) @ GAINS > 0).astype(np.int64)
        if self.noise:
            wrong = rng.random(len(action)) < self.noise
            action = np.where(wrong, rng.integers(2, size=len(action)), action)
        return action
