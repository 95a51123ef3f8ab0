"""What large language models need of the learner: micro-batches by tokens, and less memory for the same loss."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.data import Batch, Ragged
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.tokens.prefix_tree import count_tokens
from tests.agents.test_language import filled_buffer, make, rng


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**16), st.sampled_from(["grpo", "gspo", "bc", "dpo"]))
def test_micro_units_add_up_to_the_batch(most, seed, name):
    """Whatever the budget, the lengths and the order of decisions: one gradient, and no piece above the budget."""
    agent = make(max_new_tokens=9)
    buffer, _ = filled_buffer(agent.policy, count=12, seed=seed)
    options = {"grpo": {"num_epochs": 1, "batch_size": 12}, "gspo": {"num_epochs": 1, "batch_size": 12}}
    options |= {"dpo": {"batch_size": 6}}
    objective = build_objective({"id": name, **options.get(name, {})})
    objective.setup(agent, rng())
    objective.annotate(agent, buffer, buffer.rows(), rng())
    numbers = np.random.default_rng(seed)
    batch = next(iter(objective.reading.batches(buffer, numbers, 1)))
    moments = []
    for config in (LearnerConfig(), LearnerConfig(micro_units=most)):
        learner = Learner(copy.deepcopy(agent), objective, config)
        largest = []
        for piece in learner._pieces(batch):
            usage = count_tokens(agent.policy.prompt_ids(piece.observation), piece.trace["reply"])
            largest.append(usage.computed if len(piece) > (2 if name == "dpo" else 1) else 0)
        assert config.micro_units is None or max(largest) <= most
        learner.update(batch, rng())
        assert 0 < learner.metrics()["learn/useful_share"] <= 1
        moments.append(torch.cat([m.flatten() for m in learner.optimizers["policy"].first]))
    assert (moments[0] - moments[1]).norm() < 1e-5 * moments[0].norm() + 1e-9


def test_padding_inside_a_micro_batch_is_no_unit():
    """Lengths 1 and 3 beside 5: as many units as if all had 3, and still the first is padded."""
    policy = make().policy
    reply = Ragged.of([[7], [8, 9, 10], [7, 8, 9, 10, 11]])
    zeros, padded = torch.zeros(3), torch.zeros(3, 5)
    batch = Batch(
        observation={"prompt": ["a", "a", "a"]},
        action=["", "", ""],
        reward=zeros,
        discount=zeros,
        next_observation={},
        log_prob=padded - 5.0,
        mask=torch.from_numpy(reply.pad()[1]),
        trace={"reply": reply},
        notes={"advantage": torch.tensor([1.0, -1.0, 0.5]), "episode_units": torch.tensor([1.0, 3.0, 5.0])},
        num_decisions=3,
        num_units=9,
        num_episodes=3,
    )
    objective = build_objective({"id": "grpo"})
    agent = make()
    agent.policy = policy
    whole, _ = objective.policy_loss(agent, batch, rng())
    parts = [objective.policy_loss(agent, batch.take(np.array(rows)), rng())[0] for rows in ([0, 1], [2])]
    torch.testing.assert_close(sum(parts), whole)


def test_checkpointing_and_bf16_save_memory():
    """What the backward pass keeps, in bytes: less with either; the loss is the same, or close in bf16."""
    prompts = [f"a prompt of its own, number {i}, not shared with anything else" for i in range(8)]
    tiny = {"hidden_size": 64, "num_layers": 6}
    taken = make(tiny=tiny).policy.act({"prompt": prompts}, rng=rng(1))
    kept, losses = {}, {}
    for name, options in {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "bf16": {}}.items():
        policy, seen = make(tiny=tiny, **options).policy, {}
        weights = {p.data_ptr() for p in policy.parameters()}

        def keep(tensor, seen=seen, weights=weights):
            if tensor.data_ptr() not in weights:
                seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            loss = -policy.log_prob({"prompt": prompts}, taken.action, taken.trace)[0].sum() / 8
        kept[name], losses[name] = sum(seen.values()), float(loss.detach())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    assert kept["checkpointing"] < 0.4 * kept["plain"] and kept["bf16"] < 0.85 * kept["plain"], kept
    assert losses["checkpointing"] == pytest.approx(losses["plain"], rel=1e-6)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.02)
