"""A toy of text agents: spell a class as a run of tokens and stop in time. Ragged units, no tokenizer, no transformer.

Legend: N environments, B rows, U tokens of a reply, V tokens of the vocabulary (the last one ends a reply).
"""

import copy

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.plans import Drawn
from embodied_rft.data import Decisions, Field, Ragged
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import Agent, Spaces
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.mlp import MLP
from embodied_rft.objectives import build_objective
from embodied_rft.policy import Policy, UnitValues, Values
from embodied_rft.pools.incidents import Incidents
from embodied_rft.pools.protocol import StepResult

CLASSES, LONGEST = 3, 5
END, VOCABULARY = CLASSES, CLASSES + 1
TARGETS = [[k] * (k + 1) + [END] for k in range(CLASSES)]
SPACES = Spaces(gym.spaces.Box(0, 1, (CLASSES,), np.float32), gym.spaces.MultiDiscrete([VOCABULARY] * LONGEST))


def grade(reply, target):
    """Share of the places, of the longer of the two, where they agree."""
    width = max(len(reply), len(target))
    return sum(a == b for a, b in zip(reply, target)) / width


class Spelling:
    """N classes to spell, one a turn; the reward of each turn is its grade, success means all were right."""

    def __init__(self, num_envs=64, *, turns=1):
        self.num_envs, self.turns = num_envs, turns
        self.observation_space, self.action_space = SPACES.observation, SPACES.action
        self.fields = {"observation": Field((CLASSES,))}
        self.incidents = Incidents()
        self.classes = np.zeros((num_envs, turns + 1), np.int64)
        self.turn = np.zeros(num_envs, np.int64)
        self.right = np.ones(num_envs, bool)

    def reset(self, seeds, mask=None, options=None):
        for i in range(self.num_envs) if mask is None else np.flatnonzero(mask):
            self.classes[i] = np.random.default_rng(int(seeds[i])).integers(CLASSES, size=self.turns + 1)
            self.turn[i], self.right[i] = 0, True
        return self._observe()

    def _observe(self):
        now = self.classes[np.arange(self.num_envs), self.turn]
        return {"observation": np.eye(CLASSES, dtype=np.float32)[now]}

    def step(self, action):
        targets = [TARGETS[k] for k in self.classes[np.arange(self.num_envs), np.minimum(self.turn, self.turns - 1)]]
        reward = np.array([grade(list(r), t) for r, t in zip(action, targets, strict=True)], np.float32)
        self.right &= reward == 1.0
        self.turn = np.minimum(self.turn + 1, self.turns)
        over = self.turn >= self.turns
        no = np.zeros(self.num_envs, bool)
        return StepResult(self._observe(), reward, over, no, {"success": over & self.right}, ~no)

    def get_state(self):
        return None

    def close(self):
        pass


class Speller(Policy):
    """A policy that writes token by token; with `values`, its trunk also has a value before every token."""

    num_units = None
    trace_fields = {}
    spec = {"id": "speller"}

    def __init__(self, *, rng, values=False, hidden=32):
        super().__init__()
        self.net = MLP(CLASSES + LONGEST + VOCABULARY + 1, (hidden, hidden), VOCABULARY, rng=rng, last_gain=0.1)
        self.lacks = frozenset() if values else frozenset({Values, UnitValues})
        if values:
            self.head = MLP(hidden, (), 1, rng=rng)

    def _inputs(self, observation, place, previous):
        place = nn.functional.one_hot(place, LONGEST).float()
        return torch.cat([observation, place, nn.functional.one_hot(previous, VOCABULARY + 1).float()], -1)

    def _flat(self, observation, action):
        """Inputs [sum of U, features] before every token."""
        lengths = torch.from_numpy(action.lengths)
        tokens = torch.from_numpy(action.values)
        place = torch.arange(len(tokens)) - torch.from_numpy(action.offsets[:-1]).repeat_interleave(lengths)
        previous = torch.where(place == 0, VOCABULARY, tokens.roll(1))
        return self._inputs(observation["observation"].repeat_interleave(lengths, 0), place, previous), tokens

    @torch.no_grad()
    def act(self, observation, *, greedy=False, rng=None):
        shown = torch.from_numpy(observation["observation"])
        count = len(shown)
        previous, running = torch.full((count,), VOCABULARY), torch.ones(count, dtype=torch.bool)
        replies, scores = [[] for _ in range(count)], [[] for _ in range(count)]
        for u in range(LONGEST):
            logits = self.net(self._inputs(shown, torch.full((count,), u), previous)).log_softmax(-1)
            token = logits.argmax(-1) if greedy else torch.multinomial(logits.exp(), 1, generator=rng)[:, 0]
            for i in torch.nonzero(running)[:, 0].tolist():
                replies[i].append(int(token[i]))
                scores[i].append(float(logits[i, token[i]]))
            running &= token != END
            previous = token
        return Decisions(Ragged.of(replies, np.int64), Ragged.of(scores, np.float32))

    def log_prob(self, observation, action, trace):
        inputs, tokens = self._flat(observation, action)
        logits = self.net(inputs).log_softmax(-1)
        mask = torch.from_numpy(action.pad()[1])
        flat = logits.gather(1, tokens[:, None])[:, 0], -(logits.exp() * logits).sum(-1)
        log_prob, entropy = (torch.zeros(mask.shape).masked_scatter(mask, f) for f in flat)
        return log_prob, entropy

    def imitation_loss(self, observation, action, *, rng=None, trace=None, mask=None):
        return -self.log_prob(observation, action, {})[0].sum(1)

    def value(self, observation, trace=None):
        shown = observation["observation"]
        start = torch.zeros(len(shown), dtype=torch.int64)
        return self.head(self.net.hidden(self._inputs(shown, start, start + VOCABULARY))).squeeze(-1)

    def unit_values(self, observation, action, trace):
        inputs, _ = self._flat(observation, action)
        mask = torch.from_numpy(action.pad()[1])
        return torch.zeros(mask.shape).masked_scatter(mask, self.head(self.net.hidden(inputs)).squeeze(-1))

    def __deepcopy__(self, memo):
        twin = Speller(rng=torch.Generator(), values=hasattr(self, "head"), hidden=self.net.last.in_features)
        twin.load_state_dict(copy.deepcopy(self.state_dict()))
        return twin


def schema(rewards=("env",)):
    return Schema({"observation": Field((CLASSES,))}, Field((), "int64", "ragged"), units=None, rewards=rewards)


def whole(buffer, rows):
    """A batch of whole episodes, one after the other, as a plan with `whole_groups` gives it."""
    batch = buffer.batch(np.concatenate(buffer.segments(rows)))
    batch.num_episodes = len(np.unique(batch.columns["episode"]))
    return batch


class Lab:
    """One speller and one task. `tamper(batch)` may break every batch before the learner sees it."""

    def __init__(self, *, seed=0, values=False, turns=1, tamper=None, num_envs=128):
        self.pool, self.tamper = Spelling(num_envs, turns=turns), tamper
        self.rng, self.numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.agent = Agent(Speller(rng=self.rng, values=values), SPACES, rng=self.rng)
        self.buffer, self.seed, self.episodes = Buffer(schema(), 8_000), seed, 0

    def objective(self, spec, *, learning_rate=3e-3, **config):
        objective = build_objective(spec)
        objective.setup(self.agent)
        self.learner = Learner(self.agent, objective, LearnerConfig(learning_rate=learning_rate, **config))
        if self.tamper is not None:
            update = self.learner.update
            self.learner.update = lambda batch, rng, **more: update(self.tamper(batch), rng, **more)
        return objective

    def collect(self, episodes=256, *, group_size=8):
        """Whole groups of the current policy."""
        collector = Collector(self.pool, run_seed=self.seed, first_episode=self.episodes, group_size=group_size)

        def act(observation):
            return self.agent.policy.act(observation, rng=self.rng)

        version = self.learner.version if hasattr(self, "learner") else 0
        collector.collect(act, episodes=episodes, version=version).write(self.buffer)
        self.episodes = collector.next_episode

    def finetune(self, rounds, *, enough=2.0):
        """Collect and learn in turns, until the mean reward in training is enough; what the last round reported."""
        for _ in range(rounds):
            self.collect()
            updates = 30 if isinstance(self.learner.objective.reading, Drawn) else None
            metrics = self.learner.learn(self.buffer, self.numbers, num_updates=updates)
            if metrics.get("data/reward", 0.0) > enough:
                break
        return metrics

    def success(self):
        """Share of classes that a greedy reply spells right, and the mean grade of sampled replies."""
        shown = {"observation": np.eye(CLASSES, dtype=np.float32)}
        greedy = self.agent.policy.act(shown, greedy=True).action
        return np.mean([list(r) == t for r, t in zip(greedy, TARGETS, strict=True)])

    def grade(self, samples=300):
        """Mean grade of sampled replies."""
        shown = {"observation": np.tile(np.eye(CLASSES, dtype=np.float32), (samples, 1))}
        replies = self.agent.policy.act(shown, rng=torch.Generator().manual_seed(99)).action
        return np.mean([grade(list(r), TARGETS[i % CLASSES]) for i, r in enumerate(replies)])
