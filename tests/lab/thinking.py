"""A toy of thoughts: a reply is a few tokens of thought, which nobody reads, and one that answers; marks say which.

Legend: N environments, B rows, U tokens of a reply, the last of them the answer.
"""

import numpy as np
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import MARK, Decisions, Field, Ragged
from embodied_rft.learning.agent import Agent
from embodied_rft.networks.mlp import MLP
from embodied_rft.policy import Policy, UnitValues, Values
from embodied_rft.pools.protocol import StepResult
from tests.lab import spelling
from tests.lab.spelling import CLASSES, SPACES, Spelling


class Thinker(Policy):
    """Every token is drawn from logits of its own; marks are 0 of thoughts and 1 of the answer.

    With `values` it says what to expect before every token, and is told which one comes next.
    """

    num_units = None
    trace_fields = {MARK: Field((), "int8", "ragged")}
    spec = {"id": "thinker"}

    def __init__(self, *, rng, thoughts, values=False):
        super().__init__()
        self.units = thoughts + 1
        self.net = MLP(CLASSES, (32,), self.units * CLASSES, rng=rng, last_gain=0.1)
        self.lacks = frozenset() if values else frozenset({Values, UnitValues})
        if values:
            self.head = MLP(CLASSES + 2, (32,), 1, rng=rng)

    def _scores(self, observation):
        return self.net(observation["observation"]).reshape(-1, self.units, CLASSES).log_softmax(-1)

    @torch.no_grad()
    def act(self, observation, *, greedy=False, rng=None):
        scores = self._scores({"observation": torch.from_numpy(observation["observation"])})
        flat = scores.flatten(0, 1)
        token = flat.argmax(-1) if greedy else torch.multinomial(flat.exp(), 1, generator=rng)[:, 0]
        log_prob = flat.gather(1, token[:, None]).reshape(scores.shape[:2])
        mark = np.eye(self.units, dtype=np.int8)[-1:].repeat(len(scores), 0)
        rows = token.reshape(scores.shape[:2]).numpy()
        return Decisions(Ragged.of(rows, np.int64), Ragged.of(log_prob.numpy()), {MARK: Ragged.of(mark, np.int8)})

    def log_prob(self, observation, action, trace):
        scores = self._scores(observation)
        tokens = torch.from_numpy(action.pad()[0])
        return scores.gather(2, tokens[:, :, None])[:, :, 0], -(scores.exp() * scores).sum(-1)

    def value(self, observation, trace=None):
        return self.unit_values(observation, None, None)[:, 0]

    def unit_values(self, observation, action, trace):
        count, place = len(observation["observation"]), torch.arange(self.units)
        where = torch.stack([place / place[-1], place == place[-1]], -1).expand(count, -1, -1)
        shown = observation["observation"][:, None].expand(-1, self.units, -1)
        return self.head(torch.cat([shown, where], -1)).squeeze(-1)


class Answering(Spelling):
    """The answer should be the class that is shown."""

    def step(self, action):
        target = self.classes[np.arange(self.num_envs), np.minimum(self.turn, self.turns - 1)]
        right = np.array([reply[-1] for reply in action]) == target
        self.turn = np.minimum(self.turn + 1, self.turns)
        over, no = self.turn >= self.turns, np.zeros(self.num_envs, bool)
        return StepResult(self._observe(), right.astype(np.float32), over, no, {"success": over & right}, ~no)


class Lab(spelling.Lab):
    """One thinker."""

    def __init__(self, *, seed=0, thoughts=24, values=False, num_envs=64):
        self.pool, self.tamper = Answering(num_envs), None
        self.rng, self.numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        policy = Thinker(rng=self.rng, thoughts=thoughts, values=values)
        self.agent = Agent(policy, SPACES, rng=self.rng)
        columns = {"observation": Field((CLASSES,))}, Field((), "int64", "ragged"), policy.trace_fields
        self.buffer, self.seed, self.episodes = Buffer(Schema(*columns, units=None), 8_000), seed, 0

    def grade(self):
        """Share of right answers, sampled."""
        shown = np.tile(np.eye(CLASSES, dtype=np.float32), (300, 1))
        replies = self.agent.policy.act({"observation": shown}, rng=torch.Generator().manual_seed(99)).action
        return np.mean([reply[-1] == i % CLASSES for i, reply in enumerate(replies)])
