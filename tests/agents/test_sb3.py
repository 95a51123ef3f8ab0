"""stable-baselines3 models as frozen policies: the same actions as SB3, and nothing is ever unpickled."""

import json
import pickle
import zipfile

import gymnasium
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import embodied_rft.envs  # noqa: F401
from embodied_rft.agents.models.sb3_files import save_normalizer
from embodied_rft.options import parse
from embodied_rft.policy import build_policy
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.session import Interrupted, Session
from embodied_rft.testing.check_policy import check_policy
from embodied_rft.train import train

REACH = "embodied_rft/FetchReach-v0"


class Blink(gymnasium.Env):
    """An image [36, 40, 3] that tells nothing."""

    observation_space = spaces.Box(0, 255, (36, 40, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def saved(folder, algorithm, env, policy="MlpPolicy", **options):
    """A small untrained model, its zip and its spaces."""
    torch.manual_seed(0)
    options.setdefault("policy_kwargs", {"net_arch": [16, 16]})
    if algorithm in ("SAC", "TD3", "DDPG", "DQN"):
        options["buffer_size"] = 100
    model = getattr(sb3, algorithm)(policy, env, device="cpu", **options)
    model.save(folder / "model.zip")
    return model, str(folder / "model.zip"), model.get_env()


def load(path, observation_space, action_space, **options):
    rng = torch.Generator().manual_seed(0)
    return build_policy({"id": "sb3", "path": path, **options}, observation_space, action_space, rng)


def states(space, count=5):
    space.seed(3)
    return np.stack([space.sample() for _ in range(count)])


@pytest.mark.parametrize(
    ("algorithm", "env"),
    [
        ("SAC", "Pendulum-v1"),
        ("TD3", "Pendulum-v1"),
        ("DDPG", "Pendulum-v1"),
        ("PPO", "Pendulum-v1"),
        ("A2C", "CartPole-v1"),
        ("PPO", "CartPole-v1"),
        ("DQN", "CartPole-v1"),
    ],
)
def test_greedy_actions_equal_those_of_sb3(tmp_path, algorithm, env):
    model, path, _ = saved(tmp_path, algorithm, env)
    policy = load(path, model.observation_space, model.action_space)
    observation = states(model.observation_space)
    expected, _ = model.predict(observation, deterministic=True)
    ours = policy.act({"observation": observation}, greedy=True).action
    assert np.array_equal(ours, expected) and ours.dtype == expected.dtype
    assert np.array_equal(policy.mode({"observation": torch.from_numpy(observation)}).numpy(), expected)
    assert not any(p.requires_grad for p in policy.parameters())
    check_policy(policy, model.observation_space, model.action_space)


def test_goal_environment_with_hindsight_and_further_keys(tmp_path):
    env = gymnasium.make(REACH)
    model, path, _ = saved(tmp_path, "SAC", env, policy="MultiInputPolicy", replay_buffer_class=sb3.HerReplayBuffer)
    observation = {key: states(space) for key, space in env.observation_space.items()}
    expected, _ = model.predict(observation, deterministic=True)
    wider = spaces.Dict({**env.observation_space.spaces, "instruction": spaces.Text(9)})
    policy = load(path, wider, env.action_space)
    assert np.array_equal(policy.act({**observation, "instruction": ["go"] * 5}, greedy=True).action, expected)
    with pytest.raises(ValueError, match="'achieved_goal', which this environment does not give"):
        load(path, spaces.Dict({"observation": env.observation_space["observation"]}), env.action_space)


def test_images_are_transposed_as_sb3_does(tmp_path):
    env = Blink()
    model, path, _ = saved(tmp_path, "PPO", env, policy="CnnPolicy", policy_kwargs={}, n_steps=8, batch_size=8)
    observation = states(env.observation_space)
    expected, _ = model.predict(observation, deterministic=True)
    policy = load(path, env.observation_space, env.action_space)
    assert np.array_equal(policy.act({"observation": observation}, greedy=True).action, expected)
    seen, action = model.policy.obs_to_tensor(observation)[0], torch.from_numpy(expected)
    told = model.policy.get_distribution(seen).log_prob(action)[:, None]
    given, _ = policy.log_prob({"observation": torch.from_numpy(observation)}, action, {})
    torch.testing.assert_close(given, told, rtol=1e-5, atol=1e-6)  # actions alone hardly tell


def test_classes_in_policy_kwargs_are_found_by_name(tmp_path):
    kwargs = {"net_arch": {"pi": [8], "vf": [4]}, "activation_fn": torch.nn.ELU}
    model, path, _ = saved(tmp_path, "PPO", "Pendulum-v1", policy_kwargs=kwargs)
    policy = load(path, model.observation_space, model.action_space)
    observation = states(model.observation_space)
    expected, _ = model.predict(observation, deterministic=True)
    assert np.array_equal(policy.act({"observation": observation}, greedy=True).action, expected)


def test_statistics_of_vec_normalize(tmp_path):
    normalized = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]), clip_obs=0.7)
    normalized.reset()
    for _ in range(30):
        normalized.step(np.array([normalized.action_space.sample()]))
    model, path, _ = saved(tmp_path, "SAC", normalized)
    observation = states(model.observation_space)
    expected, _ = model.predict(normalized.normalize_obs(observation), deterministic=True)
    save_normalizer(normalized, tmp_path / "statistics.npz")
    with_statistics = load(
        path, model.observation_space, model.action_space, normalize=str(tmp_path / "statistics.npz")
    )
    without = load(path, model.observation_space, model.action_space)
    assert np.allclose(with_statistics.act({"observation": observation}, greedy=True).action, expected, atol=1e-6)
    assert not np.allclose(without.act({"observation": observation}, greedy=True).action, expected, atol=1e-3)
    with pytest.raises(ValueError, match="there is no file"):
        load(path, model.observation_space, model.action_space, normalize=str(tmp_path / "statistics.pkl"))


def test_samples_follow_the_distribution_of_sb3(tmp_path):
    model, path, _ = saved(tmp_path, "SAC", "Pendulum-v1")
    policy = load(path, model.observation_space, model.action_space)
    observation = np.repeat(states(model.observation_space, 1), 4000, axis=0)
    torch.manual_seed(5)
    theirs, _ = model.predict(observation)
    ours = policy.act({"observation": observation}, rng=torch.Generator().manual_seed(5)).action
    assert abs(ours.mean() - theirs.mean()) < 0.1 and abs(ours.std() - theirs.std()) < 0.1


def tampered(path, folder, **changes):
    """The same model with other entries in its JSON."""
    target = folder / "tampered.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, json.dumps({**json.loads(content), **changes}) if name == "data" else content)
    return str(target)


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemError('unpickled')",))


def test_nothing_is_unpickled_unless_trusted(tmp_path):
    import base64

    model, path, _ = saved(tmp_path, "SAC", "Pendulum-v1")
    bomb = {":type:": "bomb", ":serialized:": base64.b64encode(pickle.dumps(Bomb())).decode()}
    armed = tampered(path, tmp_path, lr_schedule=bomb, observation_space=bomb)
    policy = load(armed, model.observation_space, model.action_space)
    observation = states(model.observation_space)
    expected, _ = model.predict(observation, deterministic=True)
    assert np.array_equal(policy.act({"observation": observation}, greedy=True).action, expected)
    with pytest.raises(SystemError, match="unpickled"):
        load(armed, model.observation_space, model.action_space, trust=True)
    trusted = load(path, model.observation_space, model.action_space, trust=True)
    assert np.array_equal(trusted.act({"observation": observation}, greedy=True).action, expected)


def test_what_cannot_be_read_safely_is_asked_for(tmp_path):
    model, path, _ = saved(tmp_path, "SAC", "Pendulum-v1")
    spaces_ = (model.observation_space, model.action_space)
    foreign = tampered(path, tmp_path, policy_class={"__module__": "my.own"})
    with pytest.raises(ValueError, match="Give the option algorithm"):
        load(foreign, *spaces_)
    load(foreign, *spaces_, algorithm="SAC")
    strange = tampered(path, tmp_path, policy_kwargs={"net_arch": [16, 16], "activation_fn": "<class 'my.Sine'>"})
    with pytest.raises(ValueError, match="trust: true"):
        load(strange, *spaces_)
    load(strange, *spaces_, policy_kwargs={"net_arch": [16, 16]})
    with pytest.raises(ValueError, match="do not fit"):
        load(path, *spaces_, policy_kwargs={"net_arch": [8]})
    with pytest.raises(ValueError, match=r"did you mean 'model\.zip'"):
        load(str(tmp_path / "modle.zip"), *spaces_)
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"not a model"):
        load(str(tmp_path / "broken.zip"), *spaces_)


# --- the stage -------------------------------------------------------------------------------------------------------


def baseline(**options):
    stage = {
        "algorithm": "SAC",
        "decisions": 240,
        "options": {"policy_kwargs": {"net_arch": [16]}, "batch_size": 16, "learning_starts": 120},
        "evaluate_every": 120,
        "evaluate_episodes": 4,
        **options,
    }
    return parse_recipe(
        {
            "name": "baseline",
            "env": {"id": REACH, "num_envs": 4},
            "agent": {"id": "gaussian", "hidden": [8]},
            "logging": {"console": False},
            "stages": [{"sb3": stage}],
        }
    )


def parse_recipe(content):
    return parse(Recipe, content, "recipe")


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("wall/")} for line in lines]


def test_the_stage_trains_measures_and_saves(tmp_path):
    session = train(baseline(), tmp_path, quiet=True, report=False)
    record = session.records[0]
    assert record["decisions"] == 240 and record["updates"] == 120 and record["metrics"]["hindsight"]
    assert [line["decisions"] for line in curve(tmp_path)] == [120, 240]
    policy = load(record["metrics"]["model"], session.agent.spaces.observation, session.agent.spaces.action)
    check_policy(policy, session.agent.spaces.observation, session.agent.spaces.action)


def test_a_stopped_stage_starts_again_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    reference = train(baseline(), tmp_path / "whole", quiet=True, report=False)
    measure = Session.evaluate

    def stop_after_the_first(self, *args, **kwargs):
        self.stopping = True
        return measure(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "evaluate", stop_after_the_first)
        with pytest.raises(Interrupted):
            train(baseline(), tmp_path / "stopped", quiet=True, report=False)
    again = train(baseline(), tmp_path / "stopped", quiet=True, report=False)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    spaces_ = (again.agent.spaces.observation, again.agent.spaces.action)
    ours, theirs = (load(s.records[0]["metrics"]["model"], *spaces_).state_dict() for s in (again, reference))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_limits_and_wrong_options_of_the_stage(tmp_path):
    quick = train(baseline(until=0.0), tmp_path / "until", quiet=True, report=False)
    assert len(curve(tmp_path / "until")) == 1 and quick.records[0]["decisions"] == 120
    slow = train(baseline(max_seconds=0.0), tmp_path / "seconds", quiet=True, report=False)
    assert slow.records[0]["decisions"] == 1 and slow.records[0]["updates"] == 0
    with pytest.raises(ValueError, match="refused the options"):
        train(baseline(options={"learning_speed": 3}), tmp_path / "options", quiet=True, report=False)
    with pytest.raises(ValueError, match="hindsight True has no effect with PPO"):
        train(baseline(algorithm="PPO", hindsight=True), tmp_path / "ppo", quiet=True, report=False)
