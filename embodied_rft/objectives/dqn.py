"""`dqn`: the policy's outputs are action values, learned by bootstrapping from replay; one choice among n.

The policy itself is the Q network: its greedy choice maximises the value, `explore` takes a random one with probability
epsilon. Its weights go on from imitation or into it like those of any other objective. Legend: B rows, n options.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Replay, Share
from embodied_rft.data import Batch, Decisions, Tree
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective, fit_normalizers
from embodied_rft.networks.tensors import polyak
from embodied_rft.options import STRICT
from embodied_rft.policy import Chooses, Policy, observe, require
from embodied_rft.pools.spaces import one_choice
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class DQNConfig(Replay):
    """Options of `dqn`: how the buffer is read (`num_steps` is the n of its returns), and these."""

    double: bool = True  # the online network chooses the next action, the target network values it (Double DQN)
    huber: PositiveFloat | None = 1.0  # size at which the error turns from squared to absolute; None: squared
    tau: Share = 1.0  # how far the target network moves towards the online one
    target_every: PositiveInt = 10_000  # updates between moves of the target network
    epsilon: Share = 1.0  # share of random decisions at the start of the stage
    final_epsilon: Share = 0.05  # share of random actions once exploration has fallen
    epsilon_decisions: NonNegativeInt = 10_000  # over which it falls, linearly


@register("objective", "dqn")
class DQN(Objective):
    """Deep Q-network (Mnih et al. 2015), with the double estimator (van Hasselt et al. 2016) unless `double` is off.

    Dueling is an option of the agent. Example: {"id": "dqn", "target_every": 500, "num_steps": 3}.
    """

    Config: type = DQNConfig
    updates_per_decision = 0.25  # Mnih et al. 2015, table 1: one update for four decisions

    def __init__(self, config: DQNConfig) -> None:
        self.config = config
        self.losses: Losses = {"policy": self.policy_loss}
        self.reading: Replay = config
        self.epsilon = config.epsilon

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """The target network; the policy must have a value for each option."""
        self.choices = one_choice(agent.spaces.action, "objective 'dqn'").to(agent.device)
        why = f"objective 'dqn' needs a value for each option, {type(agent.policy).__name__} has none"
        require(agent.policy, Chooses, f"{why}: use the agent categorical")
        agent.ensure_copy("target_policy")

    # --- acting --------------------------------------------------------------------------------------------------

    def schedule(self, decisions: int) -> None:
        """Set epsilon for a stage that is `decisions` old."""
        c = self.config
        done = min(1.0, decisions / c.epsilon_decisions) if c.epsilon_decisions else 1.0
        self.epsilon = c.epsilon + done * (c.final_epsilon - c.epsilon)

    @torch.no_grad()
    def explore(self, agent: Agent, observation: Tree, rng: torch.Generator) -> Decisions:
        """The best option, or with probability epsilon any; its log-probability [N, 1] is exact."""
        policy = require(agent.policy, Chooses)
        values = policy.logits(observe(observation, agent.policy))
        best, size = values.argmax(-1, keepdim=True), values.shape[-1]
        random = torch.randint(size, best.shape, generator=rng, device=rng.device).to(best.device)
        wander = torch.rand(best.shape, generator=rng, device=rng.device).to(best.device) < self.epsilon
        index = torch.where(wander, random, best)
        share = self.epsilon / size + (1 - self.epsilon) * (index == best)
        return policy.decisions(index, share.float().log())

    # --- learning ------------------------------------------------------------------------------------------------

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of the taken action's value to r + gamma max Q' (Mnih et al. 2015, algorithm 1)."""
        index = self.choices.index(batch.action)
        q = require(agent.policy, Chooses).logits(batch.observation).gather(-1, index)[:, 0]
        error = q - self.td_target(agent, batch)
        each = 0.5 * error.square() if self.config.huber is None else losses.huber(error, delta=self.config.huber)
        loss = each.sum() / batch.num_decisions
        return loss, {"policy/loss": loss.detach(), "policy/q_mean": q.detach().mean()}

    @torch.no_grad()
    def td_target(self, agent: Agent, batch: Batch) -> Tensor:
        """[B]: the target network's value of the best next option; with `double`, of what the online one likes best."""
        target, own = (require(p, Chooses) for p in (agent.part("target_policy", Policy), agent.policy))
        values = target.logits(batch.next_observation)
        chooser = own.logits(batch.next_observation) if self.config.double else values
        value = values.gather(-1, chooser.argmax(-1, keepdim=True))[:, 0]
        return losses.td_target(batch.reward, batch.discount, value)

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Take the statistics of the observations; the target network reads with the same."""
        fit_normalizers(agent, buffer, rows)
        polyak(agent.parts["target_policy"], agent.policy, 0.0)  # statistics alone
        return {}

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the target network when it is time."""
        if update % self.config.target_every == 0:
            polyak(agent.parts["target_policy"], agent.policy, self.config.tau)
