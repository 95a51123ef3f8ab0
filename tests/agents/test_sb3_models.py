"""Every kind of model that stable-baselines3 and sb3-contrib save acts here as `model.predict` does there."""

import base64
import io
import json
import pickle
import zipfile

import gymnasium
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from embodied_rft.agents.models import inert_pickle
from embodied_rft.agents.models.sb3_files import save_normalizer
from embodied_rft.policy import build_policy
from embodied_rft.testing.check_policy import check_policy

VECTOR = spaces.Box(-2, 2, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
GOAL = spaces.Box(-1, 1, (2,), np.float32)
UNSORTED = spaces.Dict([("state", VECTOR), ("kind", spaces.Discrete(4)), ("goal", GOAL), ("camera", IMAGE)])
OBSERVATIONS = {"MlpPolicy": VECTOR, "CnnPolicy": IMAGE, "MultiInputPolicy": UNSORTED, "LinearPolicy": VECTOR}
ACTIONS = {
    "box": spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32)),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
}
CONTINUOUS = ("SAC", "TD3", "DDPG", "PPO", "A2C", "TQC", "TRPO")
THREE = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")
MATRIX = [
    *[(algorithm, policy, "box") for algorithm in CONTINUOUS for policy in THREE],
    *[(algorithm, policy, "discrete") for algorithm in ("DQN", "QRDQN", "PPO") for policy in THREE],
    *[(algorithm, "MlpPolicy", "discrete") for algorithm in ("A2C", "TRPO")],
    *[("PPO", "MlpPolicy", action) for action in ("multi_discrete", "multi_binary")],
    *[("ARS", policy, "box") for policy in ("MlpPolicy", "LinearPolicy")],
    ("CrossQ", "MlpPolicy", "box"),  # it has no other
]


class Stub(gymnasium.Env):
    """Has spaces; what it tells is random."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def algorithm_class(name):
    if hasattr(stable_baselines3, name):
        return getattr(stable_baselines3, name)
    return getattr(sb3_contrib, name)


def saved(folder, algorithm, policy, action_space, *, observation_space=None, env=None, **options):
    """(model, path of its zip): untrained, but with weights that make its actions differ."""
    torch.manual_seed(0)
    space = observation_space or OBSERVATIONS[policy]
    if algorithm in ("SAC", "TD3", "DDPG", "DQN", "TQC", "CrossQ", "QRDQN"):
        options["buffer_size"] = 10
    env = env or Stub(space, action_space)
    model = algorithm_class(algorithm)(policy, env, device="cpu", **options)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_((0.1 if isinstance(action_space, spaces.Box) else 0.2) * torch.randn(weight.shape))
    model.save(folder / "model.zip")
    return model, str(folder / "model.zip")


def load(path, observation_space, action_space, **options):
    rng = torch.Generator().manual_seed(0)
    return build_policy({"id": "sb3", "path": path, **options}, observation_space, action_space, rng)


def draw(space, count=4, *, seed=3, apart=0):
    """Rows of a space; images from light to dark, because noise looks the same everywhere. `apart`: of keys' seeds."""
    if isinstance(space, spaces.Dict):
        return {key: draw(leaf, count, seed=seed + i * apart) for i, (key, leaf) in enumerate(space.spaces.items())}
    space.seed(seed)
    rows = np.stack([space.sample() for _ in range(count)])
    return rows // np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None] if space is IMAGE else rows


def act(policy, observation):
    tree = observation if isinstance(observation, dict) else {"observation": observation}
    return policy.act(tree, greedy=True).action


@pytest.mark.parametrize(("algorithm", "policy", "action"), MATRIX)
def test_acts_as_predict_does(tmp_path, algorithm, policy, action):
    model, path = saved(tmp_path, algorithm, policy, ACTIONS[action])
    space, observation = OBSERVATIONS[policy], draw(OBSERVATIONS[policy], 16)
    ours = load(path, space, ACTIONS[action])
    expected, _ = model.predict(observation, deterministic=True)
    assert len(np.unique(expected, axis=0)) > 1, "the trial would see nothing"
    found = act(ours, observation)
    assert (found.dtype.kind == "f") == (action == "box")
    assert np.allclose(found, expected, atol=1e-5)
    if policy != "CnnPolicy" and not isinstance(space, spaces.Dict):
        check_policy(ours, space, ACTIONS[action])


@pytest.mark.parametrize("given", [sorted, reversed, list])
def test_the_order_of_the_model_counts_not_that_of_the_environment(tmp_path, given):
    state = spaces.Box(-1, 1, (2,), np.float32)  # as long as the goal: a wrong order would not be seen in the shapes
    trained = spaces.Dict([("state", state), ("it's", state), ("goal", GOAL)])
    model, path = saved(tmp_path, "PPO", "MultiInputPolicy", ACTIONS["box"], observation_space=trained)
    env = spaces.Dict([(key, trained[key]) for key in given(list(trained.spaces))])
    observation = draw(trained, apart=1)
    expected, _ = model.predict(observation, deterministic=True)
    assert np.allclose(act(load(path, env, ACTIONS["box"]), observation), expected, atol=1e-6)


def rewritten(path, folder, *, weights=None, data=None):
    """The zip with other weights or other entries in its JSON."""
    target = folder / "rewritten.zip"
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if weights is not None:
        out = io.BytesIO()
        torch.save(weights(torch.load(io.BytesIO(files["policy.pth"]), weights_only=True)), out)
        files["policy.pth"] = out.getvalue()
    if data is not None:
        files["data"] = json.dumps(data(json.loads(files["data"])))
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(target)


@pytest.mark.parametrize("policy", THREE)
def test_zips_from_before_1_7_have_one_features_extractor(tmp_path, policy):
    model, path = saved(tmp_path, "PPO", policy, ACTIONS["box"])
    before = {"pi_features_extractor", "vf_features_extractor"}
    path = rewritten(
        path, tmp_path, weights=lambda w: {k: v for k, v in w.items() if k.partition(".")[0] not in before}
    )
    theirs = stable_baselines3.PPO.load(path, device="cpu")
    observation = draw(OBSERVATIONS[policy])
    expected, _ = theirs.predict(observation, deterministic=True)
    assert np.array_equal(expected, model.predict(observation, deterministic=True)[0])
    assert np.allclose(act(load(path, OBSERVATIONS[policy], ACTIONS["box"]), observation), expected, atol=1e-6)
    lacking = rewritten(path, tmp_path, weights=lambda w: {k: v for k, v in w.items() if k != "action_net.weight"})
    with pytest.raises(ValueError, match="do not fit"):
        load(lacking, OBSERVATIONS[policy], ACTIONS["box"])


class Widened(VecNormalize):
    """A user's own subclass."""


@pytest.mark.parametrize("form", ["vector", "subclass", "dict", "some keys", "image"])
@pytest.mark.parametrize("written", ["pickle", "npz"])
def test_statistics_of_vec_normalize_in_every_form(tmp_path, form, written):
    pair = spaces.Dict([("state", VECTOR), ("goal", GOAL)])
    space = {"dict": pair, "some keys": pair, "image": IMAGE}.get(form, VECTOR)
    options = {"norm_obs_keys": ["goal"]} if form == "some keys" else {}
    cls = Widened if form == "subclass" else VecNormalize
    normalized = cls(DummyVecEnv([lambda: Stub(space, ACTIONS["box"])]), clip_obs=0.7, **options)
    normalized.reset()
    for _ in range(20):
        normalized.step(np.array([normalized.action_space.sample()]))
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    model, path = saved(tmp_path, "PPO", policy, ACTIONS["box"], env=normalized)
    file = str(tmp_path / ("statistics.npz" if written == "npz" else "statistics.pkl"))
    save_normalizer(normalized, file) if written == "npz" else normalized.save(file)
    observation = draw(space)
    expected, _ = model.predict(normalized.normalize_obs(observation), deterministic=True)
    found = act(load(path, space, ACTIONS["box"], normalize=file), observation)
    assert np.allclose(found, expected, atol=1e-5)
    assert not np.allclose(act(load(path, space, ACTIONS["box"]), observation), expected, atol=1e-3)


def test_statistics_that_do_not_belong_are_refused(tmp_path):
    def normalizer(space, **options):
        return VecNormalize(DummyVecEnv([lambda: Stub(space, ACTIONS["box"])]), **options)

    _, path = saved(tmp_path, "PPO", "MlpPolicy", ACTIONS["box"])
    file = str(tmp_path / "statistics.npz")
    with pytest.raises(ValueError, match="norm_obs=False"):
        save_normalizer(normalizer(VECTOR, norm_obs=False), file)
    save_normalizer(normalizer(GOAL), file)
    with pytest.raises(ValueError, match="belong to another environment"):
        load(path, VECTOR, ACTIONS["box"], normalize=file)
    save_normalizer(normalizer(spaces.Dict(statee=VECTOR)), file)
    with pytest.raises(ValueError, match="'statee'"):
        load(path, VECTOR, ACTIONS["box"], normalize=file)
    for content in (b"", b"\x80\x04N.", pickle.dumps({"obs_rms": 3})):
        (tmp_path / "other.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="normalize: "):
            load(path, VECTOR, ACTIONS["box"], normalize=str(tmp_path / "other.pkl"))


@pytest.mark.parametrize(
    "other",
    [
        spaces.Box(-1, 1, (2,), np.float32),
        spaces.Box(-1, 3, (3,), np.float32),
        spaces.Discrete(2),
    ],
)
def test_actions_in_other_units_are_refused(tmp_path, other):
    _, path = saved(tmp_path, "SAC", "MlpPolicy", ACTIONS["box"])
    with pytest.raises(ValueError, match="was trained for the actions Box"):
        load(path, VECTOR, other)


@pytest.mark.parametrize(
    ("algorithm", "policy", "action", "message"),
    [
        ("RecurrentPPO", "MlpLstmPolicy", "box", "hidden state"),
        ("MaskablePPO", "MlpPolicy", "discrete", "action_masks"),
    ],
)
def test_what_cannot_decide_from_one_observation_says_so(tmp_path, algorithm, policy, action, message):
    _, path = saved(tmp_path, algorithm, policy, ACTIONS[action], observation_space=VECTOR)
    with pytest.raises(ValueError, match=message):
        load(path, VECTOR, ACTIONS[action])


# --- nothing runs, nothing grows -------------------------------------------------------------------------------------


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemError('unpickled')",))


def test_an_inert_pickle_gives_data_and_runs_nothing():
    content = {"array": np.arange(6.0).reshape(2, 3), "number": np.float32(2.5), "bomb": Bomb(), "space": UNSORTED}
    for protocol in range(2, 6):
        read = inert_pickle.read(pickle.dumps(content, protocol))
        assert np.array_equal(read["array"], content["array"]) and read["number"] == 2.5
        assert list(read["space"].state["spaces"]) == ["state", "kind", "goal", "camera"]
        assert read["space"].name == "gymnasium.spaces.dict.Dict"
        assert np.array_equal(read["space"].state["spaces"]["state"].state["high"], VECTOR.high)
    with pytest.raises(ValueError, match="not a readable pickle"):
        inert_pickle.read(pickle.dumps(content)[:-30])


def test_bombs_in_every_place_of_a_zip_stay_closed(tmp_path):
    model, path = saved(tmp_path, "PPO", "MlpPolicy", ACTIONS["box"])
    bomb = {":type:": "bomb", ":serialized:": base64.b64encode(pickle.dumps(Bomb())).decode()}
    observation = draw(VECTOR)
    armed = rewritten(path, tmp_path, data=lambda data: {key: bomb for key in data} | {"use_sde": False})
    policy = load(armed, VECTOR, ACTIONS["box"], algorithm="PPO")
    assert np.allclose(act(policy, observation), model.predict(observation, deterministic=True)[0], atol=1e-6)
    with pytest.raises(ValueError, match="never unpickled") as caught:
        load(rewritten(path, tmp_path, weights=lambda _: Bomb()), VECTOR, ACTIONS["box"])
    assert "weights_only" not in str(caught.value)
    (tmp_path / "statistics.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="no statistics"):
        load(path, VECTOR, ACTIONS["box"], normalize=str(tmp_path / "statistics.pkl"))


@pytest.mark.parametrize("member", ["data", "policy.pth"])
def test_a_zip_that_grows_beyond_measure_is_not_read(tmp_path, member):
    _, path = saved(tmp_path, "PPO", "MlpPolicy", ACTIONS["box"])
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files[member] = b"[" + b" " * 20_000_000
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    assert (tmp_path / "bomb.zip").stat().st_size < 1_000_000
    with pytest.raises(ValueError, match="would grow"):
        load(str(tmp_path / "bomb.zip"), VECTOR, ACTIONS["box"])


@pytest.mark.parametrize("data", [b"[1]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_description_that_is_no_mapping_is_named(tmp_path, data):
    _, path = saved(tmp_path, "PPO", "MlpPolicy", ACTIONS["box"])
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "odd.zip", "w") as target:
        for name in archive.namelist():
            target.writestr(name, data if name == "data" else archive.read(name))
    with pytest.raises(ValueError, match="not a model that stable-baselines3 saved"):
        load(str(tmp_path / "odd.zip"), VECTOR, ACTIONS["box"])
