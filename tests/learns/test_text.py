"""Text: a small model that is often wrong becomes reliable with every kind of objective; broken twins do not.

The model is cold-started by imitation of answers most of which are wrong by one, then learns from the reward of
`TextSum` alone.
"""

import functools

import numpy as np
import pytest
import torch

import embodied_rft.envs  # noqa: F401
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.plans import Drawn
from embodied_rft.data import Source, Trajectory
from embodied_rft.envs.text.demonstrators import SumDemonstrator
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.pool import make_pool
from tests.lab.harness import fails, require

pytestmark = pytest.mark.learning
ID, GROUP, ROWS = "embodied_rft/TextSum-v0", 8, 256


class Lab:
    """One model and one task. `tamper(batch)` may break every batch before the learner sees it."""

    def __init__(self, *, seed=0, **options):
        self.pool = make_pool(ID, ROWS)
        self.judge = make_pool(ID, 100, purpose="evaluation")
        self.rng, self.numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        spec = {"id": "language", "model": {"tiny": {}}, "prompt": "plain", "max_new_tokens": 3, **options}
        self.agent = build_agent(spec, self.pool.observation_space, self.pool.action_space, self.rng)
        self.collector = Collector(self.pool, run_seed=seed, group_size=GROUP)

    def new_buffer(self):
        policy = self.agent.policy
        schema = Schema(dict(self.pool.fields), self.pool.action_field, dict(policy.trace_fields), units=None)
        return Buffer(schema, 4 * ROWS)

    def cold_start(self):
        """Imitate a teacher who is wrong more often than not."""
        buffer, teacher = self.new_buffer(), SumDemonstrator(noise=0.6)
        for a, b in self.numbers.integers(10, size=(800, 2)):
            shown = {"prompt": [f"{a}+{b}="] * 2}
            said = teacher.act({"prompt": shown["prompt"][:1]}, self.numbers)
            one = Trajectory(shown, said, np.ones(1, np.float32), "terminated", source=Source.DEMONSTRATION)
            buffer.add_trajectory(one, retrace=self.agent.policy.retrace)
        learner = self.learner({"id": "bc", "batch_size": 32}, learning_rate=3e-3)
        learner.learn(buffer, self.numbers, num_updates=400)
        return self

    def learner(self, spec, *, learning_rate):
        objective = build_objective(spec)
        objective.setup(self.agent, self.rng)
        return Learner(self.agent, objective, LearnerConfig(learning_rate=learning_rate, clip_norm=1.0))

    def finetune(self, spec, *, rounds, learning_rate, tamper=None):
        """Collect and learn in turns."""
        learner, buffer = self.learner(spec, learning_rate=learning_rate), self.new_buffer()
        update = learner.update
        if tamper is not None:
            learner.update = lambda batch, rng, **more: update(tamper(batch, self.numbers), rng, **more)
        act = functools.partial(self.agent.policy.act, rng=self.rng)
        for _ in range(rounds):
            self.collector.collect(act, episodes=ROWS, version=learner.version).write(buffer)
            updates = 8 if isinstance(learner.objective.reading, Drawn) else None
            learner.learn(buffer, self.numbers, num_updates=updates)

    def success(self):
        """Of sampled replies on held-out seeds: it is the policy that acts that should become reliable."""
        act = functools.partial(self.agent.policy.act, rng=torch.Generator().manual_seed(7))
        return evaluate(act, self.judge, evaluation_seeds(300, sheet=0)).success


@pytest.fixture(scope="module")
def started():
    """Weights after the cold start."""
    lab = Lab().cold_start()
    base = lab.success()
    require(0.2 < base < 0.5, f"the cold start gives {base}: a model that is often wrong is expected")
    return lab.agent.policy.state_dict()


def trained(started, spec, *, rounds, learning_rate=5e-4, tamper=None, references=1, seed=0, **options):
    """Success after fine-tuning."""
    lab = Lab(seed=seed, **options)
    lab.agent.policy.load_state_dict(started, strict=not options)
    for _ in range(references):  # each time around, the reference of a preference is the policy as it is now
        lab.finetune(spec, rounds=rounds // references, learning_rate=learning_rate, tamper=tamper)
    return lab.success()


def learns(*args, **kwargs):
    """From about a third to at least 0.6 of held-out sums."""
    assert trained(*args, **kwargs) >= 0.6


def shuffled(batch, numbers):
    """Credit goes to somebody else's decision."""
    order = torch.from_numpy(numbers.permutation(len(batch)))
    for name in {"advantage", "unit_advantage"} & set(batch.notes):
        batch.notes[name] = batch.notes[name][order]
    return batch


def swapped(batch, numbers):
    """The worse reply of each pair is called the better one."""
    batch.columns["chosen"] = ~batch.columns["chosen"]
    return batch


FRESH = {"num_epochs": 1, "batch_size": 64}
GROUP_CREDIT = [{"id": "grpo", **FRESH}, {"id": "rloo", **FRESH}, {"id": "dapo", **FRESH, "min_groups": 8}]
DPO = {"id": "dpo", "batch_size": 64, "chosen_weight": 1.0}
RAFT = {"id": "raft", "batch_size": 64}


@pytest.mark.parametrize("spec", GROUP_CREDIT, ids=lambda spec: spec["id"])
def test_group_credit(started, spec):
    learns(started, spec, rounds=60)
    fails(learns, started, spec, rounds=60, tamper=shuffled)


@pytest.mark.parametrize("options", [{}, {"value_head": True}], ids=["value apart", "shared trunk"])
def test_ppo(started, options):
    spec = {"id": "ppo", **FRESH}
    learns(started, spec, rounds=40, **options)
    fails(learns, started, spec, rounds=40, tamper=shuffled, **options)


def test_bi_level_credit(started):
    """A value before every token (VAGEN): as good as one for each reply, on the trunk of a shipped agent."""
    spec = {"id": "ppo", "credit": "bi_level_gae", **FRESH}
    learns(started, spec, rounds=40, value_head=True)
    fails(learns, started, spec, rounds=40, tamper=shuffled, value_head=True)


def test_raft(started):
    learns(started, RAFT | {"selection": {"newest": ROWS, "min_return": 1.0}}, rounds=16)
    fails(learns, started, RAFT | {"selection": {"newest": ROWS}}, rounds=16)  # copies whatever it said


def test_dpo(started):
    learns(started, DPO, rounds=24, learning_rate=3e-4, references=3)
    fails(learns, started, DPO, rounds=24, learning_rate=3e-4, references=3, tamper=swapped)


def test_lora(started, tmp_path):
    """Adapters alone learn, on the cold-started weights."""
    cold = Lab()
    cold.agent.policy.load_state_dict(started)
    cold.agent.policy.save_pretrained(tmp_path)
    lab = Lab(model=str(tmp_path), train="lora")
    require(lab.success() == cold.success(), "fresh adapters must change nothing")
    lab.finetune({"id": "grpo", **FRESH}, rounds=60, learning_rate=2e-3)
    assert lab.success() >= 0.6
