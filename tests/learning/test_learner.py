"""The learner: micro-batches add up, resume is exact to the bit, a bad loss changes nothing, each part steps alone."""

import copy
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.learning import optimizer
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig, NonFiniteLossError
from embodied_rft.learning.optimizer import AdamW
from embodied_rft.objectives import build_objective
from tests.lab.draws import generator
from tests.lab.point import random_batch

STATE = gym.spaces.Box(-np.inf, np.inf, (6,))
ACTION = gym.spaces.Box(-1, 1, (4,))
GAUSSIAN = {"id": "gaussian", "hidden": [32, 32]}
DETERMINISTIC = GAUSSIAN | {"deterministic": True}
CRITIC = {"critic_hidden": [32, 32]}
OBJECTIVES = {
    "bc": ("bc", GAUSSIAN),
    "sac": ({"id": "sac", **CRITIC}, GAUSSIAN),
    "td3": ({"id": "td3", "target_noise": 0.0, **CRITIC}, DETERMINISTIC),
    "td3_bc": ({"id": "td3_bc", "target_noise": 0.0, **CRITIC}, DETERMINISTIC),
    "rlpd": ({"id": "rlpd", "num_critics": 3, **CRITIC}, GAUSSIAN),
    "iql": ({"id": "iql", **CRITIC}, GAUSSIAN),
}


def batches(seed=0, size=64):
    return random_batch(STATE, ACTION, size=size, seed=seed)


def make(objective, agent, config=None, seed=0):
    agent = build_agent(agent, STATE, ACTION, generator(seed))
    objective = build_objective(objective)
    objective.setup(agent, generator(1))
    return agent, Learner(agent, objective, config)


def weights(agent):
    return {k: v.clone() for k, v in agent.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective, agent", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("size", [16, 48])
def test_micro_batches_add_up_to_one_batch(objective, agent, size):
    """Plain gradients compared, in float64, so that only the order of summation differs.

    Random numbers are drawn in the same order by whole and micro-batches only for deterministic actors, so that the
    stochastic ones are given generators that repeat.
    """
    agent, learner = make(objective, agent)
    agent.double()
    batch = batches()
    for tree in (batch.observation, batch.next_observation, batch.notes):
        tree.update({k: v.double() for k, v in tree.items()})
    batch.action, batch.reward, batch.discount = (x.double() for x in (batch.action, batch.reward, batch.discount))
    torch.set_default_dtype(torch.float64)
    try:
        for name, loss in learner.objective.losses.items():
            noise = FixedNoise(len(batch))
            gradients = []
            for pieces in ([batch], batch.split(size)):
                start = 0
                if look := getattr(learner.objective, "before_step", None):
                    look(name, agent, pieces, generator())
                total = [torch.zeros_like(p) for p in learner.parameters[name]]
                for piece in pieces:
                    piece.notes = dict(piece.notes)
                    with noise.rows(start, len(piece)):
                        value, _ = loss(agent, piece, generator())
                    start += len(piece)
                    for sum_, g in zip(total, torch.autograd.grad(value, learner.parameters[name]), strict=True):
                        sum_ += g
                gradients.append(total)
            for whole, parts in zip(*gradients, strict=True):
                torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("most, sizes", [(1, [1] * 64), (40, [40, 24]), (1000, [64])])
def test_micro_units_of_plain_actions(most, sizes):
    """One unit a decision: the budget is a number of decisions, and the gradient that of the batch."""
    moments = []
    for config in (LearnerConfig(), LearnerConfig(micro_units=most)):
        agent, learner = make(*OBJECTIVES["bc"], config)
        if config.micro_units:
            assert [len(piece) for piece in learner._pieces(batches())] == sizes
        learner.update(batches(), generator())
        moments.append(torch.cat([m.flatten() for m in learner.optimizers["policy"].first]))
    torch.testing.assert_close(*moments, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"micro_batch": 4, "micro_units": 100}, "give one"),
        ({"micro_batch": 0}, "micro_batch is 0: at least 1"),
        ({"micro_units": -3}, "micro_units is -3: at least 1"),
    ],
)
def test_bad_micro_batches_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LearnerConfig(**options)


class FixedNoise:
    """Makes torch.randn give row i of the batch the same numbers, however the batch is cut."""

    def __init__(self, count):
        self.table = np.random.default_rng(0).standard_normal((count, 16))

    def rows(self, start, count):
        patch = pytest.MonkeyPatch()
        table = torch.from_numpy(self.table[start : start + count])
        patch.setattr(torch, "randn", lambda shape, **_: table[:, : shape[-1]].clone())

        class Context:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                patch.undo()

        return Context()


@pytest.mark.parametrize("objective, agent", OBJECTIVES.values(), ids=OBJECTIVES)
def test_resumed_equals_uninterrupted_to_the_bit(objective, agent):
    config = LearnerConfig(ema=0.9, clip_norm=1.0, weight_decay=1e-3)
    agent_a, learner_a = make(objective, agent, config)
    rng_a = generator(5)
    for i in range(3):
        learner_a.update(batches(i), rng_a)
    saved = copy.deepcopy((agent_a.state_dict(), learner_a.state_dict(), rng_a.get_state()))
    agent_b, learner_b = make(objective, agent, config, seed=9)
    agent_b.load_state_dict(saved[0])
    learner_b.load_state_dict(saved[1])
    rng_b = generator()
    rng_b.set_state(saved[2])
    for i in range(3, 6):
        learner_a.update(batches(i), rng_a)
        learner_b.update(batches(i), rng_b)
    assert same(weights(agent_a), weights(agent_b))
    assert same(learner_a.averaged.state_dict(), learner_b.averaged.state_dict())
    assert learner_a.metrics() == learner_b.metrics()
    assert learner_a.version == learner_b.version and learner_a.updates == learner_b.updates == 6


def test_state_holds_tensors_and_json_scalars_only():
    _, learner = make(*OBJECTIVES["sac"])
    learner.update(batches(), generator())

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            for v in value.values():
                check(v)
        else:
            assert value is None or isinstance(value, (torch.Tensor, int, float, str, bool))

    check(learner.state_dict())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("broken", ["reward", "observation"])
def test_a_loss_that_is_not_finite_changes_no_weight_and_is_named(bad, broken):
    agent, learner = make(*OBJECTIVES["sac"])
    learner.update(batches(), generator())
    before, batch = weights(agent), batches(1)
    {"reward": batch.reward, "observation": batch.observation["observation"][:, 0]}[broken][3] = bad
    with pytest.raises(NonFiniteLossError, match="loss 'critic'"):
        learner.update(batch, generator())
    assert same(before, weights(agent))
    assert all(p.grad is None for p in agent.parameters())
    learner.update(batches(2), generator())  # and it can go on
    assert not same(before, weights(agent))


def test_each_loss_moves_its_own_part_and_no_other():
    agent, learner = make(*OBJECTIVES["sac"])
    learner.objective.after_update = lambda agent, update: None
    for name in ("critic", "policy", "temperature"):
        before = weights(agent)
        learner.update(batches(), generator(), only=[name])
        after = weights(agent)
        prefix = "policy." if name == "policy" else f"parts.{name}."
        moved = {k for k in before if not torch.equal(before[k], after[k])} - {"version"}
        assert moved and all(k.startswith(prefix) for k in moved)
        assert all(p.grad is None for p in agent.parameters())


def test_later_losses_see_earlier_steps():
    """The policy is trained on the critic after its step, as the objective's order says."""
    agent, learner = make(*OBJECTIVES["td3"], LearnerConfig(learning_rate=1e-2))
    seen = {}
    original = learner.objective.losses["policy"]

    def spy(agent, batch, rng):
        seen["critic"] = agent.parts["critic"].net.weights[0].detach().clone()
        return original(agent, batch, rng)

    learner.objective.losses["policy"] = spy
    before = agent.parts["critic"].net.weights[0].detach().clone()
    learner.updates = 1  # the delayed policy is due at the next update
    learner.update(batches(), generator())
    assert not torch.equal(seen["critic"], before)
    assert torch.equal(seen["critic"], agent.parts["critic"].net.weights[0])


def test_policy_delay_and_versions():
    agent, learner = make(*OBJECTIVES["td3"])
    versions = []
    for i in range(4):
        learner.update(batches(i), generator(i))
        versions.append(learner.version)
    assert versions == [1, 2, 2, 3]


def test_rates_clipping_and_average():
    config = LearnerConfig(learning_rate=0.1, learning_rates={"policy": 0.0}, clip_norm=1e-9, ema=0.5)
    agent, learner = make(*OBJECTIVES["sac"], config)
    assert learner.optimizers["critic"].learning_rate == 0.1
    before = agent.policy.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    learner.update(batches(), generator())
    assert same(before, agent.policy.state_dict()) and same(before, learner.averaged.state_dict())


@pytest.mark.parametrize("decay", [0.9, 0.2])
def test_the_average_follows_the_policy_by_one_minus_its_decay(decay):
    agent, learner = make(*OBJECTIVES["bc"], LearnerConfig(learning_rate=0.1, ema=decay))
    expected = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    for i in range(3):
        learner.update(batches(i), generator())
        expected = {k: decay * v + (1 - decay) * agent.policy.state_dict()[k] for k, v in expected.items()}
    assert learner.judged is learner.averaged
    for key, value in learner.averaged.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    version = learner.version
    learner.finish()
    assert same(learner.averaged.state_dict(), agent.policy.state_dict()) and learner.version == version + 1


def test_without_an_average_the_policy_itself_is_judged_and_stays():
    agent, learner = make(*OBJECTIVES["bc"])
    learner.update(batches(), generator())
    before = weights(agent)
    learner.finish()
    assert learner.judged is agent.policy and same(before, weights(agent))


@pytest.mark.parametrize("largest", [0.05, 1e6])
def test_gradients_are_shrunk_to_the_largest_norm_part_by_part(largest):
    agent, learner = make(*OBJECTIVES["sac"], LearnerConfig(clip_norm=largest))
    before = copy.deepcopy(agent)
    learner.update(batches(), generator(5), only=["critic"])
    plain, free = make(*OBJECTIVES["sac"])
    plain.load_state_dict(before.state_dict())
    free.update(batches(), generator(5), only=["critic"])
    given, wanted = (torch.cat([10 * m.flatten() for m in x.optimizers["critic"].first]) for x in (learner, free))
    assert float(wanted.norm()) > 0.05
    torch.testing.assert_close(given, wanted * min(1.0, largest / float(wanted.norm())), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["bc", "td3", "td3_bc", "iql"])
@pytest.mark.parametrize("cut", [{"micro_batch": 24}, {"micro_units": 10}], ids=str)
def test_the_learner_steps_alike_on_a_batch_and_on_its_pieces(name, cut):
    """Objectives without random numbers: the same gradients, and numbers in the log, through the learner itself."""
    found = []
    for options in ({}, cut):
        agent, learner = make(*OBJECTIVES[name], LearnerConfig(**options))
        for i in range(2):
            learner.update(batches(i), generator(i))
        moments = [m.flatten() for optimizer in learner.optimizers.values() for m in optimizer.first]
        found.append((torch.cat(moments), {k: v for k, v in learner.metrics().items() if k.endswith("loss")}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_nothing_is_left_of_a_loss_that_was_not_finite():
    ends = []
    for broken in (False, True):
        agent, learner = make(*OBJECTIVES["bc"], LearnerConfig(micro_batch=32))
        if broken:
            batch = batches(1)
            batch.action[-1] = torch.nan  # in the second piece: the first one has left its gradients
            with pytest.raises(NonFiniteLossError):
                learner.update(batch, generator())
        learner.update(batches(2), generator())
        ends.append(weights(agent))
    assert same(*ends)


@pytest.mark.parametrize("epsilon", [1e-8, 1.0])
def test_small_gradients_move_little_below_epsilon(epsilon):
    """Adam's first step is learning rate * g / (|g| + epsilon)."""
    agent, learner = make({"id": "bc"}, GAUSSIAN, LearnerConfig(learning_rate=1e-2, epsilon=epsilon))
    batch, before = batches(), [p.detach().clone() for p in learner.parameters["policy"]]
    learner.objective.losses["policy"](agent, batch, generator())[0].backward()
    gradients = [p.grad for p in learner.parameters["policy"]]
    learner.optimizers["policy"].clear()
    learner.update(batch, generator())
    for old, gradient, new in zip(before, gradients, learner.parameters["policy"], strict=True):
        expected = old - 1e-2 * gradient / (gradient.abs() + epsilon)
        torch.testing.assert_close(
            new.detach()[gradient.abs() > 1e-5], expected[gradient.abs() > 1e-5], atol=2e-5, rtol=0
        )


def test_weights_decay_relative_to_the_learning_rate():
    """Loshchilov and Hutter 2019: w - rate * decay * w, beside the step of Adam."""
    ends = []
    for decay in (0.0, 0.5):
        agent, learner = make({"id": "bc"}, GAUSSIAN, LearnerConfig(learning_rate=1e-2, weight_decay=decay))
        before = weights(agent)
        learner.update(batches(), generator())
        ends.append(weights(agent))
    head = next(name for name in before if name.endswith("last.weight"))
    torch.testing.assert_close(ends[0][head] - ends[1][head], 1e-2 * 0.5 * before[head])


@pytest.mark.parametrize("anneal, factors", [(True, (1.0, 0.25, 0.0)), (False, (1.0, 1.0, 1.0))])
def test_rates_fall_linearly_on_request(anneal, factors):
    config = LearnerConfig(learning_rate=1e-3, learning_rates={"critic": 2e-3}, anneal=anneal)
    agent, learner = make({"id": "sac", **CRITIC}, GAUSSIAN, config)
    for done, factor in zip((0.0, 0.75, 1.1), factors, strict=True):
        last = agent.policy.head.net.last.weight
        before = last.clone()
        learner.anneal(done)
        learner.update(batches(), generator())
        assert learner.optimizers["policy"].learning_rate == pytest.approx(1e-3 * factor)
        assert learner.optimizers["critic"].learning_rate == pytest.approx(2e-3 * factor)
        assert torch.equal(before, last) == (factor == 0)


def test_half_precision_stays_close_and_keeps_weights_in_fp32():
    results = []
    for precision in ("fp32", "bf16"):
        agent, learner = make(*OBJECTIVES["td3"], LearnerConfig(precision=precision))
        for i in range(5):
            learner.update(batches(i), generator(i))
        assert all(p.dtype == torch.float32 for p in agent.parameters())
        results.append(learner.metrics())
    for key in ("critic/loss", "policy/loss"):
        assert results[1][key] == pytest.approx(results[0][key], rel=0.05, abs=0.02)
        assert results[1][key] != results[0][key]


@pytest.mark.parametrize("kernel", [optimizer.KERNEL, None], ids=["fused", "plain"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_optimiser_equals_that_of_torch(decay, kernel, monkeypatch):
    monkeypatch.setattr(optimizer, "KERNEL", kernel)
    weights_ = [torch.randn(5, 3, generator=generator(i)) for i in range(2)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights_] for _ in range(2))
    a = AdamW(ours, learning_rate=0.01, weight_decay=decay)
    b = torch.optim.AdamW(theirs, lr=0.01, weight_decay=decay)
    for i in range(5):
        for parameters in (ours, theirs):
            for k, parameter in enumerate(parameters):
                parameter.grad = torch.randn(5, 3, generator=generator(10 * i + k))
        for parameter in ours:
            parameter.grad *= 3
        a.step(3.0)
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-6)
    a.clear()
    ours[0].grad = torch.ones(5, 3)
    before = ours[1].detach().clone()
    a.step()
    assert torch.equal(ours[1], before)  # no gradient, no change


PPO = {"id": "ppo", "value_hidden": [32, 32], "entropy_weight": 0.01}


def ppo_batch(seed, size=64):
    batch, rng = batches(seed, size), generator(seed)
    batch.trace = {"u": torch.randn(size, 4, generator=rng)}
    batch.notes = {name: torch.randn(size, generator=rng) for name in ("advantage", "value_target")}
    batch.log_prob = -5 + torch.randn(size, 1, generator=rng)
    return batch


def train_ppo(config, *, independent=True, sizes=(64, 64, 64), activation="relu"):
    agent, learner = make(PPO | {"value_activation": activation}, GAUSSIAN | {"activation": activation}, config)
    learner._independent = independent
    for i, size in enumerate(sizes):
        learner.update(ppo_batch(i, size), generator(i))
    return agent, learner


def test_independent_losses_in_one_backward_pass_are_those_of_two():
    """Value and policy share no weight: stepping them together changes nothing but the time it takes."""
    config = LearnerConfig(clip_norm=0.1, learning_rates={"value": 1e-3}, micro_batch=24)
    (together, a), (apart, b) = (train_ppo(config, independent=flag) for flag in (True, False))
    assert same(weights(together), weights(apart))
    assert a.metrics() == b.metrics() and a.version == b.version == 4


def test_one_bad_loss_of_several_is_named_and_changes_none():
    agent, learner = train_ppo(LearnerConfig())
    before, batch = weights(agent), ppo_batch(9)
    batch.notes["value_target"][3] = np.nan
    with pytest.raises(NonFiniteLossError, match="loss 'value'"):
        learner.update(batch, generator())
    assert same(before, weights(agent)) and all(p.grad is None for p in agent.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_compiled_losses_are_the_same_losses(activation):
    """Also for a smaller last batch, which torch compiles anew."""
    options = {"sizes": (64, 64, 40), "activation": activation}
    (plain, a), (compiled, b) = (train_ppo(LearnerConfig(compile=flag), **options) for flag in (False, True))
    for key, expected in weights(plain).items():
        torch.testing.assert_close(compiled.state_dict()[key], expected, rtol=1e-4, atol=1e-5)
    assert b.metrics() == pytest.approx(a.metrics(), rel=1e-4)


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        LearnerConfig(compile=True)


def test_metrics_are_means_since_the_last_call():
    _, learner = make(*OBJECTIVES["bc"])
    values = []
    for i in range(2):
        learner.update(batches(i), generator())
        values.append(learner.metrics()["policy/loss"])
    assert learner.metrics() == {} and all(isinstance(v, float) for v in values)
    _, learner = make(*OBJECTIVES["bc"])
    for i in range(2):
        learner.update(batches(i), generator())
    assert learner.metrics()["policy/loss"] == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"learning_rates": {"critc": 0.1}}, "did you mean 'critic'"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        make(*OBJECTIVES["sac"], LearnerConfig(**config))
    _, learner = make(*OBJECTIVES["sac"])
    with pytest.raises(ValueError, match="did you mean 'policy'"):
        learner.update(batches(), generator(), only=["polcy"])
    _, other = make(*OBJECTIVES["bc"])
    with pytest.raises(ValueError, match="the objective that the state was saved from"):
        other.load_state_dict(learner.state_dict())
