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
from embodied_rft.envs.turns.speech import Legal
from embodied_rft.envs.turns.telling import EXPERT, LEGAL
from embodied_rft.envs.worlds.world import Follower
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.making import find_spec

OURS = tuple(sorted(id for id in gymnasium.registry if id.startswith("embodied_rft/Told")))


@registry.register("demonstrator", "told", *OURS)
class ToldPlayer:
    """The demonstrator of what was lifted, who speaks; reads "state", or the "expert" of worlds, which must be shown.

    Args:
        noise: of the demonstrator inside: of games, the share of decisions that are drawn at random. With 1 none is
            needed: answers are drawn at random, and show nothing but their form.
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
        if of in known:
            self.inner = registry.find("demonstrator", of)(noise=noise, **(player or {}))
        elif noise == 1 and player is None:
            self.inner = None
        else:
            raise UserError(
                f"no scripted demonstrator for {of!r}, which is lifted; {nearest(of, known)}. "
                "With noise: 1 answers are drawn at random, and show nothing but their form"
            )

    def act(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        """One reply for each of N observations."""
        for key, option, wanted in (
            (EXPERT, "options.expert", isinstance(self.inner, Follower)),
            ("state", "state", self.inner is not None and not isinstance(self.inner, Follower)),
            ("told", "told", self.thinks),
        ):
            if wanted and key not in observation:
                raise UserError(f"the demonstrator reads {key!r}: set env.options.{option} to true")
        said = self._say(observation, rng)
        thoughts = observation["told"] if self.thinks else [""] * len(said)
        return [self.lifted.parser.write(words, thought) for words, thought in zip(said, thoughts, strict=True)]

    def _say(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        """Decisions in words."""
        speech, messages = self.lifted.speech, observation["message"]
        legal: list[Legal] = [None] * len(messages)
        if self.lifted.menu:
            if LEGAL not in observation:
                raise UserError(f"the demonstrator reads {LEGAL!r}: set env.options.state or options.expert to true")
            legal = [tuple(said.split("\n")) for said in observation[LEGAL]]
        if self.inner is None:
            return [speech.draw(rng, one) for one in legal]
        seen = {key: observation[key] for key in ("state", EXPERT) if key in observation}
        actions = self.inner.act(seen | {"observation": seen.get("state")}, rng)
        return [speech.say(action, one) or speech.draw(rng, one) for action, one in zip(actions, legal, strict=True)]
