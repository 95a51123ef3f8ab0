"""Who knows the environment that was lifted, and answers as its parser asks: demonstrations for language agents.

Boundary: the inner environment's own demonstrator decides; here its decision becomes a reply, with a thought if asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium
import numpy as np

from embodied_rft import registry
from embodied_rft.envs.serving import make_batch
from embodied_rft.envs.turns.lifted import Lifted
from embodied_rft.envs.turns.telling import chosen_of
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.making import find_spec

OURS = tuple(sorted(id for id in gymnasium.registry if id.startswith("embodied_rft/Told")))


@registry.register("demonstrator", "told", *OURS)
class ToldPlayer:
    """The demonstrator of what was lifted, who speaks. Reads "state", so the environment must show it.

    Args:
        noise: of the demonstrator inside: of games, the share of decisions that are drawn at random.
        thought: "state": what the position is, in words, comes before the answer (the environment's option `told`).
        player: further options of the demonstrator inside.
        environment: id and options of the environment, told by whoever makes demonstrators.
    """

    def __init__(
        self,
        *,
        noise: float = 0.0,
        thought: Literal["none", "state"] = "none",
        player: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any],
    ) -> None:
        if thought not in ("none", "state"):
            raise UserError(f"thought is {thought!r}; {nearest(thought, ('none', 'state'))}")
        made = make_batch(**find_spec(environment["id"]).kwargs | dict(environment["options"]), num_envs=1)
        assert isinstance(made, Lifted)
        made.close()
        self.lifted, self.thinks = made, thought == "state"
        of, known = made.of, registry.known("demonstrator")
        if of not in known:
            raise UserError(f"no scripted demonstrator for {of!r}, which is lifted; {nearest(of, known)}")
        self.inner = registry.find("demonstrator", of)(noise=noise, **(player or {}))

    def act(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        """One reply for each of N observations."""
        for key, wanted in (("state", True), ("told", self.thinks)):
            if wanted and key not in observation:
                raise UserError(f"the demonstrator reads {key!r}: set env.options.{key} to true")
        actions = self.inner.act({"state": observation["state"], "observation": observation["state"]}, rng)
        space, bins = self.lifted.host.action_space, self.lifted.bins
        said = [self.lifted.vocabulary.say(chosen_of(space, action, bins)) for action in actions]
        thoughts = observation["told"] if self.thinks else [""] * len(said)
        return [self.lifted.parser.write(words, thought) for words, thought in zip(said, thoughts, strict=True)]
