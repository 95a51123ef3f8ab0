"""`sb3`: a model saved by stable-baselines3 as a frozen policy: a baseline to evaluate, or the base of a residual.

An SB3 zip holds weights (safe to read), plain JSON, and cloudpickled Python objects, which may run any code when they
are read. This file reads the first two and rebuilds the policy from the environment's spaces; what it cannot read
safely it asks for. If the run used VecNormalize, its statistics are not in the zip: write them with `save_normalizer`
and give the file as option `normalize`.

Legend: N, B rows, A action dimensions.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft import sb3_baseline  # noqa: F401  registers the stage of the same name
from embodied_rft.agent import require_rng
from embodied_rft.data import Decisions, Field, Tree
from embodied_rft.registry import nearest, register

ALGORITHMS = ("SAC", "PPO", "A2C", "TD3", "DDPG", "DQN")
# The module of a policy class, which the zip tells as text, and an algorithm that has this class.
MODULES = {
    "stable_baselines3.sac.policies": "SAC",
    "stable_baselines3.td3.policies": "TD3",
    "stable_baselines3.dqn.policies": "DQN",
    "stable_baselines3.common.policies": "PPO",
}
ACTIVATIONS = ("ReLU", "Tanh", "ELU", "LeakyReLU", "GELU", "SiLU", "Sigmoid", "Identity")
EXTRACTORS = ("FlattenExtractor", "NatureCNN", "CombinedExtractor")
UNUSED = ("optimizer_class", "optimizer_kwargs")  # of policy_kwargs: this policy is frozen


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True)
class SB3Config:
    """Options of an `sb3` agent; what is None is read from the zip."""

    path: str  # the zip that model.save() wrote
    algorithm: Literal["SAC", "PPO", "A2C", "TD3", "DDPG", "DQN"] | None = None
    policy: Literal["MlpPolicy", "CnnPolicy", "MultiInputPolicy"] | None = None  # None: by the observation space
    policy_kwargs: dict[str, Any] | None = None  # classes by name: {net_arch: [64, 64], activation_fn: Tanh}
    keys: tuple[str, ...] | None = None  # observation keys that the model was trained on
    normalize: str | None = None  # npz file of save_normalizer
    trust: bool = False  # let SB3 unpickle the zip: only for files that you made yourself


@register("agent", "sb3")
class SB3Policy(nn.Module):
    """One unit a decision; a deterministic model (TD3, DDPG, DQN, any with gSDE noise) has log-probability 0.

    The trace of a stochastic model with action vectors holds `u`: the action before squashing (SAC) or clipping (PPO).
    """

    Config = SB3Config
    num_units = 1
    spec: dict[str, Any]
    low: Tensor  # [A] bounds of the action space
    high: Tensor

    def __init__(
        self, config: SB3Config, *, observation_space: gym.Space, action_space: gym.Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        archive = read_archive(config.path)
        keys = config.keys or recorded_keys(archive["data"])
        self.observation_space = select_keys(observation_space, keys)
        self.action_space = action_space
        with torch.random.fork_rng(devices=[]):  # SB3 draws initial weights from the global generator
            self.policy = self._build(archive)
        self.policy.set_training_mode(False)
        self.requires_grad_(False)
        self.squashed = isinstance(action_space, spaces.Box) and bool(self.policy.squash_output)
        chooser = self.policy if hasattr(self.policy, "get_distribution") else getattr(self.policy, "actor", None)
        self.stochastic = hasattr(chooser, "action_dist") and not getattr(chooser, "use_sde", False)
        vectors = self.stochastic and isinstance(action_space, spaces.Box)
        self.trace_fields = {"u": Field(tuple(action_space.shape or ()))} if vectors else {}
        if isinstance(action_space, spaces.Box):
            self.register_buffer("low", torch.from_numpy(action_space.low), persistent=False)
            self.register_buffer("high", torch.from_numpy(action_space.high), persistent=False)
        self.statistics = load_normalizer(config.normalize)

    def _build(self, archive: dict[str, Any]) -> Any:
        from stable_baselines3.common.policies import ActorCriticPolicy
        from stable_baselines3.common.save_util import load_from_zip_file

        data, config = archive["data"], self.config
        space = channels_first(self.observation_space)
        if config.trust:
            trusted, _, _ = load_from_zip_file(config.path, device="cpu")
            assert trusted is not None
            policy_class, kwargs = trusted["policy_class"], trusted["policy_kwargs"]
        else:
            algorithm = config.algorithm or find_algorithm(data, config.path)
            policy_class = policy_class_of(algorithm, config.policy, self.observation_space)
            kwargs = readable_kwargs(data, config.policy_kwargs, config.path)
        if issubclass(policy_class, ActorCriticPolicy):
            kwargs = {"use_sde": data.get("use_sde", False), **kwargs}
        policy = policy_class(space, self.action_space, lambda _: 0.0, **kwargs)
        try:
            policy.load_state_dict(archive["weights"])
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {config.path} do not fit a {policy_class.__name__} with {kwargs} on {space}, "
                f"{self.action_space}. Give the options policy_kwargs (net_arch), policy, algorithm or keys of the run "
                f"that wrote it, and its environment. {error}"
            ) from None
        return policy

    def train(self, mode: bool = True) -> SB3Policy:
        """Does nothing: the model is frozen, its dropout and batch statistics stay off."""
        return super().train(False)

    def _inputs(self, observation: Tree) -> Any:
        """What SB3's networks read: float tensors, images with channels first, statistics applied."""
        device = next(self.policy.parameters()).device
        inputs = {}
        for key, space in leaves(self.observation_space).items():
            value = torch.as_tensor(observation[key], device=device)
            if key in self.statistics["mean"]:
                mean, var = (torch.as_tensor(self.statistics[name][key], device=device) for name in ("mean", "var"))
                value = (value - mean) / torch.sqrt(var + self.statistics["epsilon"])
                value = value.clamp(-self.statistics["clip"], self.statistics["clip"]).float()
            inputs[key] = value.movedim(-1, 1) if is_channels_last(space) else value
        return inputs if isinstance(self.observation_space, spaces.Dict) else inputs["observation"]

    def _distribution(self, observation: Tree) -> Any:
        inputs = self._inputs(observation)
        if hasattr(self.policy, "get_distribution"):
            return self.policy.get_distribution(inputs)
        mean, log_std, _ = self.policy.actor.get_action_dist_params(inputs)
        return self.policy.actor.action_dist.proba_distribution(mean, log_std)

    def _to_env(self, raw: Tensor) -> Tensor:
        """SB3's action [B, ...] in the environment's units and bounds."""
        raw = raw.reshape(-1, *(self.action_space.shape or ()))
        if not isinstance(self.action_space, spaces.Box):
            return raw
        if self.squashed:
            return self.low + 0.5 * (raw + 1.0) * (self.high - self.low)
        return torch.minimum(torch.maximum(raw, self.low), self.high)

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]."""
        if greedy or not self.stochastic:
            raw = self.policy._predict(self._inputs(observation), deterministic=True)
            action = self._to_env(raw)
        else:
            distribution, raw = self._sample(observation, require_rng(rng))
            action = self._to_env(raw)
            if self.squashed:
                raw = distribution.gaussian_actions
        trace = {}
        if self.trace_fields:
            u = torch.atanh(raw.clamp(-1 + 1e-6, 1 - 1e-6)) if self.squashed and greedy else raw
            trace = {"u": u.reshape(action.shape)}
        log_prob, _ = self.log_prob(observation, action, trace)
        return Decisions(action.cpu().numpy(), log_prob.cpu().numpy(), {k: v.cpu().numpy() for k, v in trace.items()})

    def _sample(self, observation: Tree, rng: torch.Generator) -> tuple[Any, Tensor]:
        """SB3 samples from the global generator: lend it a seed from ours, and put it back as it was."""
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            distribution = self._distribution(observation)
            return distribution, distribution.sample()

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, [B, 1] each; without "u" in the trace it is recovered from the action.

        A squashed Gaussian has no closed entropy: the negative log-probability stands for it.
        """
        if not self.stochastic:
            zeros = torch.zeros(len(action), 1)
            return zeros, zeros
        distribution = self._distribution(observation)
        if self.squashed:
            u = trace["u"] if "u" in trace else self._unsquash(action)
            log_prob = distribution.log_prob(torch.tanh(u), u)
        else:
            log_prob = distribution.log_prob(trace.get("u", action))
        entropy = distribution.entropy()
        return log_prob[:, None], (-log_prob if entropy is None else entropy)[:, None]

    def _unsquash(self, action: Tensor) -> Tensor:
        raw = 2.0 * (action - self.low) / (self.high - self.low) - 1.0
        return torch.atanh(raw.clamp(-1 + 1e-6, 1 - 1e-6))

    def mode(self, observation: Tree) -> Tensor:
        """Deterministic action [B, A], or [B] of a discrete space."""
        return self._to_env(self.policy._predict(self._inputs(observation), deterministic=True))


# ---------------------------------------------------------------------------------------------------------------------
# Reading a zip without unpickling
# ---------------------------------------------------------------------------------------------------------------------


def read_archive(path: str) -> dict[str, Any]:
    """{"data": the JSON of the zip, "weights": state_dict of the policy}. Nothing is unpickled."""
    file = Path(path) if Path(path).suffix == ".zip" else Path(f"{path}.zip")
    if not file.is_file():
        others = [p.name for p in file.parent.glob("*.zip")]
        raise ValueError(f"there is no SB3 model {file}; in this folder {nearest(file.name, others)}")
    try:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data"))
            weights = torch.load(io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not a model that stable-baselines3 saved with model.save(): {error}") from None
    return {"data": data, "weights": weights}


def find_algorithm(data: Mapping[str, Any], path: str) -> str:
    """An algorithm with the policy class of the zip (A2C counts as PPO, DDPG as TD3: they share their policies)."""
    recorded = data.get("policy_class", {})
    module = recorded.get("__module__") if isinstance(recorded, dict) else None
    if module not in MODULES:
        raise ValueError(
            f"{path} has a policy class from {module!r}, which is not one of SB3's own. Give the option algorithm "
            f"({', '.join(ALGORITHMS)}) if its networks are standard, or trust: true if you made this file."
        )
    return MODULES[module]


def recorded_keys(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Keys of the Dict observation space that the zip tells as text; None for other spaces."""
    text = data.get("observation_space", {}).get("spaces", "")
    return tuple(re.findall(r"'([^']+)': \w+\(", text)) or None


def readable_kwargs(data: Mapping[str, Any], given: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """policy_kwargs for the constructor: given ones, else the zip's, with known classes looked up by name."""
    raw = dict(given if given is not None else data.get("policy_kwargs", {}))
    raw = {k: v for k, v in raw.items() if k not in (":type:", ":serialized:", *UNUSED)}
    return {key: _readable(key, value, path) for key, value in raw.items()}


def _readable(key: str, value: Any, path: str) -> Any:
    if key == "activation_fn" and isinstance(value, str):
        return _by_name(key, value, ACTIVATIONS, nn, path)
    if key == "features_extractor_class" and isinstance(value, str):
        from stable_baselines3.common import torch_layers

        return _by_name(key, value, EXTRACTORS, torch_layers, path)
    if isinstance(value, str) and value.startswith("<"):
        raise ValueError(
            f"{path} has policy_kwargs[{key!r}] = {value}, which cannot be read without unpickling. Give the option "
            "policy_kwargs in full, or trust: true if you made this file."
        )
    return value


def _by_name(key: str, text: str, names: tuple[str, ...], home: Any, path: str) -> type:
    name = text.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    if name not in names:
        raise ValueError(
            f"{path}: policy_kwargs[{key!r}] is {text}; {nearest(name, names)}. For a class of your own set "
            "trust: true if you made this file."
        )
    return getattr(home, name)


def policy_class_of(algorithm: str, name: str | None, observation_space: gym.Space) -> type:
    """SB3's policy class for an algorithm: by `name`, else by the kind of observation."""
    import stable_baselines3

    if name is None:
        image = any(is_channels_last(space) for space in leaves(observation_space).values())
        dictionary = isinstance(observation_space, spaces.Dict)
        name = "MultiInputPolicy" if dictionary else "CnnPolicy" if image else "MlpPolicy"
    return getattr(stable_baselines3, algorithm).policy_aliases[name]


# ---------------------------------------------------------------------------------------------------------------------
# Spaces and statistics
# ---------------------------------------------------------------------------------------------------------------------


def leaves(space: gym.Space) -> dict[str, gym.Space]:
    """The keys of a Dict space, or {"observation": space}."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}


def select_keys(space: gym.Space, keys: tuple[str, ...] | None) -> gym.Space:
    """The part of a Dict space that the model reads."""
    if keys is None or not isinstance(space, spaces.Dict):
        return space
    missing = [key for key in keys if key not in space.spaces]
    if missing:
        raise ValueError(
            f"the model reads the observation {missing[0]!r}, which this environment does not give; "
            f"{nearest(missing[0], space.spaces)}"
        )
    return spaces.Dict({key: space[key] for key in keys})


def is_channels_last(space: gym.Space) -> bool:
    """Whether SB3 would turn this image [H, W, C] to [C, H, W]."""
    shape = space.shape or ()
    image = isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(shape) == 3
    return image and shape[-1] == min(shape) and shape[0] != shape[-1]


def channels_first(space: gym.Space) -> gym.Space:
    """The space as SB3's VecTransposeImage presents it to the policy."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: channels_first(child) for key, child in space.spaces.items()})
    if not is_channels_last(space):
        return space
    height, width, channels = space.shape or ()
    return spaces.Box(0, 255, (channels, height, width), np.uint8)


def save_normalizer(vec_normalize: Any, path: str | Path) -> None:
    """Write the observation statistics of an SB3 `VecNormalize` as a plain npz file for the option `normalize`."""
    running = vec_normalize.obs_rms
    running = running if isinstance(running, dict) else {"observation": running}
    arrays = {f"{name}/{key}": getattr(rms, name) for key, rms in running.items() for name in ("mean", "var")}
    np.savez(path, epsilon=vec_normalize.epsilon, clip=vec_normalize.clip_obs, **arrays)


def load_normalizer(path: str | None) -> dict[str, Any]:
    """{"mean": {key: array}, "var": {key: array}, "epsilon", "clip"}; empty statistics without a path."""
    empty: dict[str, Any] = {"mean": {}, "var": {}, "epsilon": 0.0, "clip": 0.0}
    if path is None:
        return empty
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        raise ValueError(
            f"normalize: {path!r} is not an npz file that exists. SB3's own VecNormalize file is a pickle, which is "
            "never loaded: write it anew with embodied_rft.agents.sb3.save_normalizer(vec_normalize, 'statistics.npz')."
        )
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            kind, _, key = name.partition("/")
            if key:
                empty[kind][key] = file[name]
            else:
                empty[kind] = float(file[name])
    return empty
