"""Every key of every observation space is read by every agent and critic, or refused by name."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embodied_rft.learning.agent import build_agent
from embodied_rft.networks.encoder import Encoder, is_image
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives import build_objective
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.pools.protocol import flatten_space
from embodied_rft.testing.check_policy import _observations
from tests.lab.draws import generator

ACTION = spaces.Box(-1, 1, (2,), np.float32)
SMALL = {"hidden": [16], "num_image_features": 8}
CHAIN = {"width": 16, "num_blocks": 1, "num_image_features": 8}
BASE = {"id": "gaussian", **SMALL}
TALKS = {"model": {"tiny": {}}}
AGENTS = {
    "gaussian": (BASE, ACTION),
    "deterministic": ({**BASE, "deterministic": True}, ACTION),
    "residual": ({"id": "residual", "base": BASE, "last_gain": 1.0, **SMALL}, ACTION),
    "diffusion": ({"id": "diffusion", "denoising_steps": 2, **CHAIN}, ACTION),
    "flow": ({"id": "flow", "num_steps": 2, "horizon": 2, **CHAIN}, ChunkBox(ACTION, horizon=2)),
    "consistency": ({"id": "consistency", **CHAIN}, ACTION),
    "last_steps": ({"id": "last_steps", "num_steps": 1, "base": {"id": "flow", "num_steps": 2, **CHAIN}}, ACTION),
    "steering": (
        {"id": "steering", "base": {"id": "flow", "num_steps": 2, **CHAIN}, "last_gain": 1.0, **SMALL},
        ACTION,
    ),
}
TALKERS = {
    "vla": ({"id": "vla", "instruction": "go", **TALKS}, ACTION),
    "sees": ({"id": "language", "prompt": "plain", "model": {"tiny_vlm": {}}}, spaces.Text(9)),
    "language": ({"id": "language", "prompt": "plain", **TALKS}, spaces.Text(9)),
}


class Mission(gym.Space):
    """A space of texts that is no spaces.Text, as MiniGrid has one."""

    def __init__(self):
        super().__init__(dtype=str)

    def sample(self, *args, **kwargs):
        return "go to the green door"

    def contains(self, x):
        return isinstance(x, str)


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64]


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 7, 17]), max_size=4)))
    if np.prod(shape) > 2000:
        shape = shape[:2]
    kind = draw(st.sampled_from(["float", "unbounded", "integer", "all integers", "bool"]))
    if kind == "bool":
        return spaces.Box(0, 1, shape, bool)
    if kind in ("float", "unbounded"):
        low, high = (-np.inf, np.inf) if kind == "unbounded" else draw(st.sampled_from([(0, 1), (-3, 5)]))
        return spaces.Box(low, high, shape, draw(st.sampled_from([np.float32, np.float64, np.float16])))
    dtype = draw(st.sampled_from(INTEGERS))
    info = np.iinfo(dtype)
    low, high = (info.min, info.max) if kind == "all integers" else (0, draw(st.sampled_from([1, 10, 100])))
    return spaces.Box(low, high, shape, dtype)


LEAVES = st.one_of(
    boxes(),
    st.builds(spaces.Discrete, st.integers(2, 9), start=st.integers(-3, 3)),
    st.builds(lambda n: spaces.MultiDiscrete(n), st.lists(st.integers(2, 5), min_size=1, max_size=3)),
    st.just(spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [-1, 2]])),
    st.builds(spaces.MultiBinary, st.sampled_from([1, 4, (2, 3)])),
    st.sampled_from(
        [spaces.Box(0, 255, shape, np.uint8) for shape in [(7, 7, 3), (84, 84), (4, 20, 20), (2, 16, 16, 3)]]
    ),
)
TEXTS = st.sampled_from([spaces.Text(5), Mission()])
TREES = st.recursive(
    LEAVES | LEAVES | LEAVES | TEXTS,
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(spaces.Dict),
    max_leaves=4,
)


def blind(agent, space, refused=None):
    """Keys whose change changes neither what the agent does nor what its parts say."""
    first, second = _observations(space, 8), {}
    for key, value in first.items():
        second[key] = np.roll(value, 1, 0) if isinstance(value, np.ndarray) else value[1:] + value[:1]
    found = []
    for key in first:
        if isinstance(first[key], list) or (first[key] == second[key]).all():
            continue
        changed = {**first, key: second[key]}
        if np.array_equal(say(agent, first), say(agent, changed)):
            found.append(key)
        for part in agent.parts.values():
            action = torch.from_numpy(agent.policy.act(first, greedy=True).action)
            with torch.no_grad():
                values = [part(as_tensors(seen), action) for seen in (first, changed)]
            if torch.equal(*values):
                found.append(f"{key} by a critic")
    return found


def say(agent, seen):
    """What a greedy decision is computed from: logits, not the likeliest; not what bounds may have cut."""
    if hasattr(agent.policy, "condition"):
        return agent.policy.condition(as_tensors(seen)).detach().numpy()
    if hasattr(agent.policy, "logits"):
        return agent.policy.logits(as_tensors(seen)).detach().numpy()
    decisions = agent.policy.act(seen, greedy=True)
    return np.asarray(decisions.trace.get("u", decisions.action))


@pytest.mark.parametrize("name", AGENTS)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(space=TREES)
def test_every_key_changes_the_decision_or_is_refused_by_name(name, space):
    spec, action = AGENTS[name]
    texts = [key for key, leaf in flatten_space(space).items() if leaf.dtype is not None and leaf.dtype.kind == "U"]
    if texts:
        with pytest.raises(ValueError, match=f"{sorted(texts)[0]!r} is text.*`keys`"):
            build_agent(spec, space, action, generator())
        return
    agent = build_agent(spec, space, action, generator())
    agent.ensure("critic", "critic")
    assert blind(agent, space) == []


@pytest.mark.parametrize("name", TALKERS)
def test_agents_that_read_text_name_what_they_would_not_read(name):
    spec, action = TALKERS[name]
    image, text, state = spaces.Box(0, 255, (32, 32, 3), np.uint8), spaces.Text(9), spaces.Box(-1, 1, (3,))
    reads = {"vla": {"image": image, "state": state}, "sees": {"image": image, "prompt": text}}
    space = reads.get(name, {"prompt": text})
    build_agent(spec, spaces.Dict(space), action, generator())
    grey = {"grey": spaces.Box(0, 255, (32, 32), np.uint8)}
    unreadable = {"vla": grey, "sees": {"state": state}, "language": {"goal": spaces.Discrete(3)}}[name]
    with pytest.raises(ValueError, match=f"{next(iter(unreadable))!r}.*would not be read"):
        build_agent(spec, spaces.Dict({**space, **unreadable}), action, generator())


def encode(space, value, **options):
    encoder = Encoder(space, rng=generator(), **options)
    return encoder(as_tensors({key: np.asarray(each)[None] for key, each in value.items()}))[0].detach()


def test_numbers_are_read_as_they_are_meant():
    space = spaces.Dict(
        robot=spaces.Dict(q=spaces.Box(-9, 9, (2,), np.float32), on=spaces.MultiBinary(2)),
        goal=spaces.Discrete(3, start=-1),
        cards=spaces.MultiDiscrete([2, 3], start=[0, 5]),
        ram=spaces.Box(0, 255, (2,), np.uint8),
        rank=spaces.Box(0, 10, (2,), np.uint8),
        score=spaces.Box(-(2**62), 2**62, (1,), np.int64),
    )
    value = {"robot/q": [0.5, -7], "robot/on": np.int8([1, 0]), "goal": 1, "cards": [1, 5]}
    value |= {"ram": np.uint8([0, 255]), "rank": np.uint8([0, 10]), "score": [10**6]}
    value = {k: np.float32(v) if k == "robot/q" else v for k, v in value.items()}
    features = encode(space, value)  # keys in the order of their names
    expected = [0, 1, 1, 0, 0, 0, 0, 1, 0, np.arcsinh(255), -1, 1, 1, 0, 0.5, -7, np.arcsinh(1e6)]
    torch.testing.assert_close(features, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(encode(space, value, keys=["robot"]), features[[14, 15, 12, 13]])


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ((84, 84), np.uint8, True),
        ((7, 7, 3), np.uint8, True),
        ((4, 84, 84), np.uint8, True),
        ((4, 84, 84, 1), np.uint8, True),
        ((128,), np.uint8, False),
        ((64, 64, 3), np.float32, True),
        ((64, 64), np.float32, True),
        ((10, 6), np.float32, False),
        ((5, 5, 3), np.float32, False),
        ((5, 5, 3), np.int64, False),
        ((), np.float32, False),
    ],
)
def test_what_is_looked_at_as_a_picture(shape, dtype, expected):
    assert is_image(spaces.Box(0, 10, shape, dtype)) == expected


@pytest.mark.parametrize("layout", [(0, 1, 2), (2, 0, 1)], ids=["channels last", "channels first"])
def test_a_picture_is_the_same_whatever_its_form(layout):
    """Bytes or floats, channels first or last, other bounds: equal features from equal weights."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    seen = encode(spaces.Box(0, 255, picture.shape, np.uint8), {"observation": picture})
    moved = picture.transpose(layout)
    forms = [(0, 255, moved), (0, 1, (moved / 255).astype(np.float32)), (-1, 1, (moved / 127.5 - 1).astype(np.float32))]
    for low, high, form in forms:
        again = encode(spaces.Box(low, high, form.shape, form.dtype), {"observation": form})
        torch.testing.assert_close(again, seen, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        *(((147,), dtype) for dtype in INTEGERS),
        ((1,), np.uint8),
        ((9, 4), np.uint8),
        ((7, 7), np.uint8),
        ((7, 7, 3), np.uint8),
        ((3, 7, 7), np.uint8),
    ],
)
def test_small_numbers_in_a_type_that_holds_large_ones_are_far_apart(shape, dtype):
    """MiniGrid's codes are 0 to 10 of 255, as a grid or flat: as grey values they would be one colour."""
    info = np.iinfo(dtype)
    agent = build_agent(
        {"id": "categorical"}, spaces.Box(info.min, info.max, shape, dtype), spaces.Discrete(3), generator()
    )
    build_objective("discrete_sac").setup(agent)
    build_objective("ppo").setup(agent)
    one = np.ones((1, *shape), dtype)
    two = one.copy()
    two.flat[one.size // 2] = 2
    for part in (agent.policy, agent.parts["critic"], agent.parts["value"]):
        features = [part.encoder(as_tensors({"observation": each})) for each in (one, two)]
        assert float((features[0] - features[1]).detach().abs().max()) > 0.05


@pytest.mark.parametrize(
    "space, message",
    [
        (spaces.Dict(a=spaces.Box(-1, 1, (2,)), mission=Mission()), "'mission' is text"),
        (spaces.Tuple([spaces.Discrete(2)]), "'observation' is a Tuple"),
        (spaces.Dict(a=spaces.Dict(b=spaces.Graph(spaces.Discrete(2), None))), "'a/b' is a Graph"),
        (spaces.Dict(number=spaces.Discrete(10**6)), "'number' has 1000000 values"),
        (spaces.Box(-1, 1, (0,)), "nothing to read"),
    ],
)
def test_what_no_network_can_read_is_refused_by_name(space, message):
    with pytest.raises(ValueError, match=message):
        build_agent(BASE, space, ACTION, generator())


def test_text_that_is_left_out_on_purpose_is_left_out():
    space = spaces.Dict(direction=spaces.Discrete(4), mission=Mission())
    agent = build_agent({**BASE, "keys": ["direction"]}, space, ACTION, generator())
    build_objective("sac").setup(agent)
    taken = agent.policy.act({"direction": np.array([0, 3]), "mission": ["go", "stop"]}, greedy=True)
    assert np.abs(taken.action[0] - taken.action[1]).max() > 0


@pytest.mark.parametrize(
    "space", [spaces.Box(0, 255, (32, 32, 3), np.uint8), spaces.Discrete(5)], ids=["pixels", "choice"]
)
def test_nothing_to_normalise_is_said(space):
    with pytest.raises(ValueError, match="normalize has no effect.*leave the option out"):
        build_agent({**BASE, "normalize": True}, space, ACTION, generator())
