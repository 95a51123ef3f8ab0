"""Statistics of actions: whatever occurs in the data can be said again, and nothing in it explodes or vanishes."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embodied_rft.agents.parts.chain import Codec
from embodied_rft.agents.parts.normalisation import LARGEST, Statistics
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Field, Trajectory

KINDS = ["min_max", "quantile", "mean_std"]
FREE = spaces.Box(-np.inf, np.inf, (1,), np.float32)


def codec(kind, space=FREE, *, horizon=1, unit=False):
    return Codec(space, horizon, kind, layout={}, unit=unit)


def column(shape, count, rng):
    """A dimension of robot data, [count], in fp32."""
    values = {
        "uniform": rng.uniform(-1, 1, count),
        "heavy": rng.standard_t(1.5, count),
        "constant": np.full(count, rng.normal()),
        "binary": np.sign(rng.normal(size=count)),
        "rare": (np.arange(count) == count // 2).astype(float),  # a gripper that closes once
        "almost constant": 1 + 1e-3 * (np.arange(count) == 3),
        "two sided": np.where(np.arange(count) == 5, -1.0, (np.arange(count) == 6).astype(float)),
    }
    return values[shape]


SHAPES = ["uniform", "heavy", "constant", "binary", "rare", "almost constant", "two sided"]


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([1e-4, 1.0, 300.0]),
    st.sampled_from([0.0, -20.0]),
    st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_action_of_the_data_comes_back(shape, kind, unit, size, shift, seed):
    rng = np.random.default_rng(seed)
    data = torch.from_numpy(
        (size * (column(shape, int(rng.integers(10, 1500)), rng) + shift))[:, None].astype(np.float32)
    )
    coded = codec(kind, unit=unit)
    coded.statistics.fit({"action": data})
    normal = coded.encode(data)
    tolerance = 1e-5 * float(data.abs().max())
    assert torch.allclose(coded.decode(normal), data, rtol=0, atol=tolerance)
    assert normal.abs().max() <= (1 if unit else LARGEST) + 1e-3, "rare events must not be all of the loss"
    spread = float(data.max() - data.min())
    if spread > 1e-3 * float(data.abs().max()):
        assert normal.max() - normal.min() > 0.3, "what varies in the data must vary for the network"
    far = coded.decode(torch.tensor([[-1e6], [1e6]]))  # samples end near the data, in its own unit
    assert bool(torch.isfinite(far).all()) and float((far[1] - far[0]).abs()) <= 14 * spread + 2 * tolerance
    if shape == "constant":
        assert torch.equal(far, data[:1].expand(2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rare_action_between_the_rows_that_are_looked_at(kind):
    count = 300
    action = np.random.default_rng(0).uniform(-1, 1, (count, 4)).astype(np.float32)  # two steps of two dimensions
    action[:, [1, 3]] = 0
    action[151, 3] = 1  # of the rows below every tenth is looked at
    buffer = Buffer(Schema(observation={"observation": Field((1,))}, action=Field((4,)), trace={}, units=1), 400)
    observation = {"observation": np.zeros((count + 1, 1), np.float32)}
    buffer.add_trajectory(Trajectory(observation, action, np.zeros(count, np.float32), "truncated"))
    coded = codec(kind, spaces.Box(-np.inf, np.inf, (2,), np.float32), horizon=2)
    coded.fit(buffer, buffer.rows(), limit=30)
    data = torch.from_numpy(action)
    assert torch.allclose(coded.decode(coded.encode(data)), data, atol=1e-5)
    numbers = coded.statistics.hash
    coded.fit(buffer, buffer.rows()[:5], limit=30)
    assert coded.statistics.hash == numbers  # taken once


def test_a_dimension_that_stood_still_moves_by_its_own_unit_later():
    statistics = Statistics({"drawer": 2}, kind="mean_std")
    statistics.fit({"drawer": torch.stack([torch.randn(3000), torch.zeros(3000)], 1)})
    opened = statistics.normalise("drawer", torch.tensor([[0.0, 0.1], [0.0, 0.2], [0.0, 0.4]]))[:, 1]
    assert opened.tolist() == pytest.approx([0.1, 0.2, 0.4])


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_travel_with_the_weights_and_are_hashed(kind):
    first, second = codec(kind), codec(kind)
    data = torch.cat([torch.zeros(500, 1), torch.ones(1, 1)])
    first.statistics.fit({"action": data})
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.decode(second.encode(data)), first.decode(first.encode(data)))
    edited = {k: v * 2 if "high/" in k else v for k, v in first.state_dict().items()}
    with pytest.raises(ValueError, match="own hash"):
        codec(kind).load_state_dict(edited)
