"""Units and histories of LeRobot policies: processors of every form against a plain transcription of its rules."""

import collections
import json
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from embodied_rft.agents.models.lerobot_processors import _Scaling
from embodied_rft.policy import build_policy

MODES = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
FEATURES = {
    "observation.state": {"type": "STATE", "shape": [3]},
    "observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]},
}
ACTION = {"action": {"type": "ACTION", "shape": [2]}}
SPACE = gym.spaces.Dict(
    {"state": gym.spaces.Box(-9, 9, (3,), np.float32), "top": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)}
)
KEYS = {"state": "observation.state", "top": "observation.images.top"}
STEP = gym.spaces.Box(-90, 90, (2,), np.float32)


class Raw(nn.Module):
    """Knows normalised numbers only: its action repeats what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @classmethod
    def from_pretrained(cls, path):
        return cls()

    def predict_action_chunk(self, batch):
        image = batch["observation.images.top"].mean((1, 2, 3))
        action = torch.stack([batch["observation.state"][:, 0], batch["observation.state"][:, 2] + image], -1)
        return self.weight * torch.stack([action, -action], 1)


def statistics(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"observation.state": (3,), "observation.images.top": (3, 1, 1), "action": (2,)}
    names = [name for pair in MODES.values() for name in pair]
    made = {f"{key}.{name}": rng.uniform(0.5, 3, shape) for key, shape in shapes.items() for name in names}
    made["observation.state.max"][1] = made["observation.state.min"][1]  # a dimension that stood still
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in made.items()}


def scaled(x, key, mode, numbers, *, inverse):
    """LeRobot's NormalizerProcessorStep._apply_transform, line by line."""
    if mode == "IDENTITY":
        return x
    first, second = (numbers[f"{key}.{name}"] for name in MODES[mode])
    if mode == "MEAN_STD":
        return x * second + first if inverse else (x - first) / (second + 1e-8)
    width = torch.where(second == first, torch.tensor(1e-8), second - first)
    return (x + 1) / 2 * width + first if inverse else 2 * (x - first) / width - 1


def expected(observation, modes, numbers):
    image = torch.from_numpy(observation["top"]).permute(0, 3, 1, 2).float() / 255
    batch = {
        "observation.state": scaled(
            torch.from_numpy(observation["state"]), "observation.state", modes["STATE"], numbers, inverse=False
        ),
        "observation.images.top": scaled(image, "observation.images.top", modes["VISUAL"], numbers, inverse=False),
    }
    action = Raw().predict_action_chunk(batch)
    return scaled(action, "action", modes["ACTION"], numbers, inverse=True).detach().numpy()


def write(folder, modes, numbers, *, form="processors", extra=(), **config):
    """A folder as LeRobot writes it, since 0.4 ("processors") or before ("buffers")."""
    content = {"type": "raw", "normalization_mapping": modes, "input_features": FEATURES, "output_features": ACTION}
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    if form == "buffers":
        buffers = {}
        for name, value in numbers.items():
            key, _, statistic = name.rpartition(".")
            side = "unnormalize_outputs" if key == "action" else "normalize_inputs"
            buffers[f"{side}.buffer_{key.replace('.', '_')}.{statistic}"] = value.clone()
        save_file({"weight": torch.ones(1), **buffers}, folder / "model.safetensors")
        return folder
    for part, step, features in (
        ("preprocessor", "normalizer_processor", {**FEATURES, **ACTION}),
        ("postprocessor", "unnormalizer_processor", ACTION),
    ):
        state = f"policy_{part}_step_1_{step}.safetensors"
        save_file({key: value.clone() for key, value in numbers.items()}, folder / state)
        scaling = {"eps": 1e-8, "features": features, "norm_map": modes}
        steps = [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": step, "config": scaling, "state_file": state},
            {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
            *extra,
        ]
        (folder / f"policy_{part}.json").write_text(json.dumps({"name": f"policy_{part}", "steps": steps}))
    return folder


def build(folder, policy="Raw", *, space=SPACE, keys=KEYS, **options):
    spec = {
        "id": "lerobot",
        "path": str(folder),
        "policy": f"{__name__}:{policy}",
        "keys": keys,
        "horizon": 2,
        **options,
    }
    return build_policy(spec, space, STEP, torch.Generator().manual_seed(0))


def observations(count=5):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return {"state": rng.uniform(-3, 3, (count, 3)).astype(np.float32), "top": image}


@pytest.mark.parametrize("form", ["processors", "buffers"])
@pytest.mark.parametrize("mode", [*MODES, "IDENTITY"])
def test_processors_and_older_buffers_are_applied(tmp_path, form, mode):
    modes = {"STATE": mode, "VISUAL": "MEAN_STD", "ACTION": mode}
    numbers, observation = statistics(), observations()
    found = build(write(tmp_path, modes, numbers, form=form)).act(observation).action.reshape(-1, 2, 2)
    assert np.allclose(found, expected(observation, modes, numbers), rtol=1e-4, atol=1e-4)
    plain = {"STATE": "IDENTITY", "VISUAL": "IDENTITY", "ACTION": "IDENTITY"}
    assert not np.allclose(found, expected(observation, plain, numbers), atol=1e-2)


def test_keys_may_be_renamed_and_left_alone(tmp_path):
    modes, numbers = {"STATE": "MEAN_STD", "VISUAL": "MEAN_STD", "ACTION": "MIN_MAX"}, statistics()
    folder = write(tmp_path, modes, numbers)
    file = folder / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    content["steps"][0]["config"]["rename_map"] = {"observation.images.front": "observation.images.top"}
    content["steps"][2]["config"]["normalize_observation_keys"] = ["observation.state"]
    file.write_text(json.dumps(content))
    policy = build(folder, keys={"state": "observation.state", "top": "observation.images.front"})
    observation = observations()
    found = policy.act(observation).action.reshape(-1, 2, 2)
    assert np.allclose(found, expected(observation, {**modes, "VISUAL": "IDENTITY"}, numbers), rtol=1e-4, atol=1e-4)


def broken(tmp_path, what):
    modes, numbers = {"STATE": "MEAN_STD", "VISUAL": "IDENTITY", "ACTION": "MIN_MAX"}, statistics()
    if what == "unknown step":
        return write(tmp_path, modes, numbers, extra=[{"registry_name": "relative_actions_processor", "config": {}}])
    if what == "class of a step":
        return write(tmp_path, modes, numbers, extra=[{"class": "os.system", "config": {}}])
    if what == "unknown mode":
        return write(tmp_path, {**modes, "STATE": "LOG"}, numbers)
    if what == "half precision":
        return write(
            tmp_path,
            modes,
            numbers,
            extra=[{"registry_name": "device_processor", "config": {"float_dtype": "bfloat16"}}],
        )
    if what == "no numbers":
        numbers.pop("action.max")
    if what == "never fitted":
        numbers["observation.state.std"][:] = torch.inf
    folder = write(tmp_path, modes, numbers)
    if what in ("one of two", "neither"):
        (folder / "policy_postprocessor.json").unlink()
    if what == "neither":
        (folder / "policy_preprocessor.json").unlink()
    if what == "no JSON":
        (folder / "policy_preprocessor.json").write_text("{")
    if what == "no mapping":
        (folder / "policy_preprocessor.json").write_text("[3]")
    if what == "truncated":
        file = next(folder.glob("policy_post*.safetensors"))
        file.write_bytes(file.read_bytes()[:50])
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unknown step", "'relative_actions_processor'"),
        ("class of a step", "'os.system'"),
        ("unknown mode", "LOG"),
        ("half precision", "bfloat16"),
        ("no numbers", "'action.max'"),
        ("never fitted", "not finite"),
        ("one of two", "policy_postprocessor.json is missing"),
        ("neither", "holds no statistics"),
        ("no JSON", "no processor of LeRobot"),
        ("no mapping", "no processor of LeRobot"),
        ("truncated", "cannot be read"),
    ],
)
def test_a_folder_whose_units_cannot_be_known_is_refused(tmp_path, what, message):
    with pytest.raises(ValueError, match=message):
        build(broken(tmp_path, what))


# --- histories -------------------------------------------------------------------------------------------------------


class Frames(nn.Module):
    """Compares the first of three observations with the last, from queues that `select_action` fills, as LeRobot's."""

    class config:
        n_obs_steps = 3
        input_features: ClassVar = {"observation.state": None, "observation.images.top": None}
        image_features: ClassVar = ["observation.images.top"]

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.reset()

    @classmethod
    def from_pretrained(cls, path):
        return cls()

    def reset(self):
        names = ("observation.state", "observation.images")
        self._queues = {name: collections.deque(maxlen=3) for name in names} | {"action": collections.deque(maxlen=2)}

    def predict_action_chunk(self, batch):
        batch = {key: torch.stack(list(queue), 1) for key, queue in self._queues.items() if key in batch}
        assert batch["observation.images"].shape[1:] == (3, 1, 3, 8, 8)
        light = batch["observation.images"].mean((2, 3, 4, 5))
        first, last = batch["observation.state"][:, 0, :2], batch["observation.state"][:, -1, :2]
        noise = torch.randn(len(first), 2)
        return torch.stack([last - first + noise, (light[:, -1] - light[:, 0])[:, None].expand(-1, 2)], 1)


def history(count=4):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (count, 3, 8, 8, 3), dtype=np.uint8)
    return {"state": rng.uniform(-3, 3, (count, 3, 3)).astype(np.float32), "top": image}


def stacked(space, count):
    return gym.spaces.Dict(
        {
            k: gym.spaces.Box(np.stack([s.low] * count), np.stack([s.high] * count), dtype=s.dtype)
            for k, s in space.items()
        }
    )


def test_a_history_is_read_from_the_observation_and_nothing_is_remembered(tmp_path):
    policy, observation = build(tmp_path, "Frames", space=stacked(SPACE, 3)), history()
    taken = policy.act(observation, greedy=True).action.reshape(-1, 2, 2)
    light = observation["top"].astype(np.float32).mean((2, 3, 4)) / 255
    assert np.allclose(taken[:, 1], (light[:, -1] - light[:, 0])[:, None], atol=1e-5)
    policy.act(history(2))  # another decision in between
    assert np.array_equal(policy.act(observation, greedy=True).action.reshape(-1, 2, 2), taken)
    moved = np.mean(taken[:, 0] - (observation["state"][:, -1, :2] - observation["state"][:, 0, :2]))
    assert abs(moved) < 1.5  # noise of mean 0
    drawn = [policy.act(observation, rng=torch.Generator().manual_seed(seed)).action for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    before = torch.random.get_rng_state()
    policy.act(observation, greedy=True)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("space", [SPACE, stacked(SPACE, 2)])
def test_without_its_history_a_policy_is_refused_with_the_line_that_helps(tmp_path, space):
    with pytest.raises(ValueError, match="FrameStackObservation, stack_size: 3"):
        build(tmp_path, "Frames", space=space)


def test_what_a_policy_reads_must_be_given(tmp_path):
    with pytest.raises(ValueError, match=r"reads 'observation\.images\.top'"):
        build(tmp_path, "Frames", space=stacked(SPACE, 3), keys={"state": "observation.state"})


def test_lerobot_itself_if_it_is_installed(tmp_path):
    factory = pytest.importorskip("lerobot.policies.factory")
    types = pytest.importorskip("lerobot.configs.types")
    inputs = {key: types.PolicyFeature(types.FeatureType(f["type"]), tuple(f["shape"])) for key, f in FEATURES.items()}
    inputs["observation.images.top"] = types.PolicyFeature(types.FeatureType.VISUAL, (3, 64, 64))
    cls = factory.get_policy_class("diffusion")
    small = {"down_dims": (16, 32), "num_train_timesteps": 10, "num_inference_steps": 3, "crop_shape": None}
    config = cls.config_class(
        input_features=inputs,
        output_features={"action": types.PolicyFeature(types.FeatureType.ACTION, (2,))},
        device="cpu",
        horizon=8,
        n_action_steps=4,
        pretrained_backbone_weights=None,
        **small,
    )
    policy = cls(config)
    numbers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in statistics().items():
        key, _, statistic = name.rpartition(".")
        numbers.setdefault(key, {})[statistic] = value
    for part in (policy, *factory.make_pre_post_processors(config, dataset_stats=numbers)):
        part.save_pretrained(tmp_path)
    space = {"state": SPACE["state"], "top": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    spec = {"id": "lerobot", "path": str(tmp_path), "keys": KEYS, "horizon": 4}
    ours = build_policy(spec, stacked(gym.spaces.Dict(space), 2), STEP, torch.Generator().manual_seed(0))
    observation = {key: np.stack([leaf.sample(), leaf.sample()])[None] for key, leaf in space.items()}
    found = ours.act(observation, rng=torch.Generator().manual_seed(3)).action.reshape(4, 2)
    pre, post = factory.make_pre_post_processors(policy.config, pretrained_path=str(tmp_path))
    policy.eval().reset()
    for step in range(2):
        image = torch.from_numpy(observation["top"][:, step]).permute(0, 3, 1, 2).float() / 255
        batch = pre(
            {"observation.state": torch.from_numpy(observation["state"][:, step]), "observation.images.top": image}
        )
        policy._queues["action"].clear()
        torch.manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3))))
        first = policy.select_action(batch)
    rest = [policy._queues["action"].popleft() for _ in range(3)]
    assert np.allclose(found, torch.cat([post(action) for action in (first, *rest)]).numpy(), atol=1e-4)


def test_eps_counts_on_the_way_in_alone():
    """As in LeRobot: (x - mean) / (std + eps), and back x * std + mean."""
    made = {"features": {"action": {"type": "ACTION"}}, "norm_map": {"ACTION": "MEAN_STD"}, "eps": 0.5}
    state = {"action.mean": torch.tensor([1.0, 2.0]), "action.std": torch.tensor([0.5, 3.0])}
    x = torch.tensor([[4.0, 5.0]])
    there, back = (
        _Scaling("a step", made, state, inverse=inverse)({"action": x})["action"] for inverse in (False, True)
    )
    assert there.tolist() == [[3.0, pytest.approx(3 / 3.5)]] and back.tolist() == [[3.0, 17.0]]
