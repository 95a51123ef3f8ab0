"""What stable-baselines3 writes: model zips and VecNormalize statistics, read without running anything that is in them.

A zip holds weights (safe to read), plain JSON, and cloudpickled Python objects, which may run any code when they are
unpickled; of those only the data of the spaces is looked at (`inert_pickle`). Boundary: files to plain data, classes of
policies and spaces; no policy is made here.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from embodied_rft.agents.models import inert_pickle
from embodied_rft.agents.models.inert_pickle import Inert
from embodied_rft.data import Space
from embodied_rft.names import UserError, nearest

CONTRIB = ("TQC", "CrossQ", "QRDQN", "TRPO", "ARS")  # of the package sb3-contrib
ALGORITHMS = ("SAC", "PPO", "A2C", "TD3", "DDPG", "DQN", *CONTRIB)
# The module of a policy class, which the zip tells as text, and an algorithm that has this class.
MODULES = {
    "stable_baselines3.sac.policies": "SAC",
    "stable_baselines3.td3.policies": "TD3",
    "stable_baselines3.dqn.policies": "DQN",
    "stable_baselines3.common.policies": "PPO",
    "sb3_contrib.tqc.policies": "TQC",
    "sb3_contrib.crossq.policies": "CrossQ",
    "sb3_contrib.qrdqn.policies": "QRDQN",
    "sb3_contrib.ars.policies": "ARS",
}
REFUSED = {  # what a policy that decides from one observation alone cannot be
    "sb3_contrib.common.recurrent.policies": "a recurrent policy (RecurrentPPO) decides from a hidden state that it "
    "carries from step to step, and an agent here decides from the observation alone, so that runs can be resumed and "
    "decisions scored again. Train PPO on stacked frames (VecFrameStack), or clone its demonstrations with bc",
    "sb3_contrib.common.maskable.policies": "a maskable policy (MaskablePPO) needs the environment's action_masks() at "
    "every decision, which are no part of an observation. Train PPO, or clone its demonstrations with bc",
}
ACTIVATIONS = ("ReLU", "Tanh", "ELU", "LeakyReLU", "GELU", "SiLU", "Sigmoid", "Identity")
EXTRACTORS = ("FlattenExtractor", "NatureCNN", "CombinedExtractor")
UNUSED = ("optimizer_class", "optimizer_kwargs")  # of policy_kwargs: the policy is frozen
LARGEST_RATIO = 50  # by which a member may grow when it is unpacked: SB3 does not compress at all
MEMBERS = ("data", "policy.pth")

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Archive:
    """A model zip: what of it can be read safely."""

    path: str
    data: dict[str, Any]  # its JSON
    weights: Weights  # of the policy
    keys: tuple[str, ...] | None  # of a Dict observation, in the order in which the model concatenates them
    action: Inert | None  # action space, as it was when the model was trained


def read_archive(path: str) -> Archive:
    """Read a zip of `model.save()`. Nothing is unpickled.

    Raises:
        ValueError: it is missing, no such zip, damaged, or unpacks to far more than its size.
    """
    file = Path(path) if Path(path).suffix == ".zip" else Path(f"{path}.zip")
    if not file.is_file():
        others = [p.name for p in file.parent.glob("*.zip")]
        raise UserError(f"there is no SB3 model {file}; in this folder {nearest(file.name, others)}")
    what = f"{file} is not a model that stable-baselines3 saved with model.save()"
    try:
        with zipfile.ZipFile(file) as archive:
            text, weights = (_unpack(archive, name, str(file)) for name in MEMBERS)
        data = json.loads(text)
        if not isinstance(data, dict):
            raise UserError(f"{what}: 'data' holds {type(data).__name__}, expected a JSON object")
        loaded = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except KeyError as error:
        raise UserError(f"{what}: {error.args[0]}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: policy.pth holds more than tensors, which is never unpickled. Save the model again with "
            "stable-baselines3 >= 1.0, or keep away from it if it comes from others."
        ) from None
    except (zipfile.BadZipFile, UnicodeDecodeError, json.JSONDecodeError, EOFError, RuntimeError, RecursionError) as e:
        raise UserError(f"{what}: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{what}: policy.pth holds no state_dict")
    return Archive(str(file), data, dict(loaded), recorded_keys(data), recorded_space(data.get("action_space")))


def _unpack(archive: zipfile.ZipFile, name: str, path: str) -> bytes:
    """A member of a zip, and of the zip that torch puts into it, unless it grows beyond all measure."""
    info = archive.getinfo(name)
    _check_growth(info.file_size, info.compress_size, f"{path}: {name}")
    content = archive.read(name)
    if name.endswith(".pth") and zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as inner:
            _check_growth(sum(one.file_size for one in inner.infolist()), len(content), f"{path}: {name}")
    return content


def _check_growth(size: int, packed: int, what: str) -> None:
    if size > LARGEST_RATIO * packed + 2**20:
        raise UserError(
            f"{what} would grow from {packed / 2**20:.1f} MiB to {size / 2**20:,.1f} MiB when it is unpacked. SB3 "
            "compresses nothing, so this file was not written by it; it is not read."
        )


def read_trusted(path: str) -> tuple[type, dict[str, Any]]:
    """(policy class, policy_kwargs) of a zip, unpickled by SB3: runs whatever code is in the file."""
    from stable_baselines3.common.save_util import load_from_zip_file

    data, _, _ = load_from_zip_file(path, device="cpu")
    if not data or "policy_class" not in data:
        raise UserError(f"{path}: SB3 cannot unpickle its policy class here; install what it was made with")
    return data["policy_class"], dict(data.get("policy_kwargs") or {})


# ---------------------------------------------------------------------------------------------------------------------
# Spaces of the training
# ---------------------------------------------------------------------------------------------------------------------


def recorded_space(entry: object) -> Inert | None:
    """The stand-in of a space that the zip has pickled, or None where it cannot be read as data."""
    serialized = entry.get(":serialized:") if isinstance(entry, dict) else None
    if isinstance(serialized, str):
        with contextlib.suppress(ValueError):
            space = inert_pickle.read(base64.b64decode(serialized))
            return space if isinstance(space, Inert) and ".spaces." in space.name else None
    return None


def recorded_keys(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Keys of the Dict observation space in the model's order; None for other spaces."""
    entry = data.get("observation_space")
    space = recorded_space(entry)
    children = space.state.get("spaces") if space is not None else None
    if isinstance(children, Inert):  # an OrderedDict's subclass
        children = children.state
    if isinstance(children, Mapping) and all(isinstance(key, str) for key in children):
        return tuple(children)
    text = entry.get("spaces", "") if isinstance(entry, dict) else ""  # as SB3 prints it beside the pickle
    found = re.findall(r"""(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")(?:: |, )[A-Z]\w*\(""", str(text))
    return tuple(single or double for single, double in found) or None


def check_action_space(archive: Archive, space: Space) -> None:
    """Refuse another action space than the model was trained for: its outputs would mean something else, silently.

    Raises:
        ValueError: other bounds, shape or number of actions.
    """
    recorded = archive.action
    if recorded is None:
        return
    kind = recorded.name.rpartition(".")[2]
    given = {name: recorded.state[name] for name in ("low", "high", "n", "nvec") if name in recorded.state}
    same = kind in {cls.__name__ for cls in type(space).__mro__} and all(
        np.shape(value) == np.shape(getattr(space, name)) and np.allclose(value, getattr(space, name))
        for name, value in given.items()
    )
    if not same:
        text = ", ".join(f"{name} {np.asarray(value).tolist()}" for name, value in given.items())
        raise UserError(
            f"{archive.path} was trained for the actions {kind}({text}); this environment takes {space}. Give it the "
            "environment that it was trained in, with the same wrappers (rescaling of actions is one)."
        )


def leaves(space: Space) -> dict[str, Space]:
    """The keys of a Dict space, or {"observation": space}."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}


def select_keys(space: Space, keys: tuple[str, ...] | None) -> Space:
    """The part of a Dict space that the model reads, in the model's order: it concatenates them one after the other."""
    if keys is None or not isinstance(space, spaces.Dict):
        return space
    missing = [key for key in keys if key not in space.spaces]
    if missing:
        raise UserError(
            f"the model reads the observation {missing[0]!r}, which this environment does not give; "
            f"{nearest(missing[0], space.spaces)}"
        )
    return spaces.Dict([(key, space[key]) for key in keys])  # pairs keep their order, a mapping would be sorted


def is_channels_last(space: Space) -> bool:
    """Whether SB3 turns this image [H, W, C] to [C, H, W]."""
    from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

    return isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space)


def model_space(space: Space, normalizer: Normalizer) -> Space:
    """The observation space as SB3's wrappers VecNormalize and VecTransposeImage present it to the policy."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(key, _model_leaf(key, child, normalizer)) for key, child in space.spaces.items()])
    return _model_leaf("observation", space, normalizer)


def _model_leaf(key: str, space: Space, normalizer: Normalizer) -> Space:
    if key in normalizer.mean:  # numbers from here on, even if they were an image
        return spaces.Box(-normalizer.clip, normalizer.clip, space.shape, np.float32)
    if not is_channels_last(space):
        return space
    height, width, channels = space.shape or ()
    return spaces.Box(0, 255, (channels, height, width), np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Policy classes and their options
# ---------------------------------------------------------------------------------------------------------------------


def find_class(archive: Archive, algorithm: str | None, policy: str | None, space: Space) -> type:
    """SB3's policy class: by the options, else by what the zip tells as text, else by the kind of observation."""
    recorded = archive.data.get("policy_class")
    recorded = recorded if isinstance(recorded, dict) else {}
    module = recorded.get("__module__")
    if algorithm is None:
        if module in REFUSED:
            raise UserError(f"{archive.path}: {REFUSED[module]}.")
        if module not in MODULES:
            raise UserError(
                f"{archive.path} has a policy class from {module!r}, which is not one of SB3's own. Give the option "
                f"algorithm ({', '.join(ALGORITHMS)}) if its networks are standard, or trust: true if you made this "
                "file: that unpickles it, which may run any code."
            )
        name = re.match(r"<function (\w+)\.__init__ at ", str(recorded.get("__init__", "")))
        if policy is None and name is not None:
            cls = getattr(_import(MODULES[module], module), name[1], None)
            if isinstance(cls, type):
                return cls
        algorithm = MODULES[module]
    if policy is None:
        image = any(is_channels_last(leaf) for leaf in leaves(space).values())
        dictionary = isinstance(space, spaces.Dict)
        policy = "MultiInputPolicy" if dictionary else "CnnPolicy" if image else "MlpPolicy"
    package = _import(algorithm, "sb3_contrib" if algorithm in CONTRIB else "stable_baselines3")
    aliases = getattr(package, algorithm).policy_aliases
    if policy not in aliases:
        raise UserError(f"{algorithm} has no policy {policy!r}; {nearest(policy, aliases)}")
    return aliases[policy]


def _import(algorithm: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(
            f"models of {algorithm} need the package sb3-contrib, which is not installed: pip install sb3-contrib"
        ) from None


def readable_kwargs(archive: Archive, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """policy_kwargs for the constructor: given ones, else the zip's, with known classes looked up by name."""
    recorded = archive.data.get("policy_kwargs") or {}
    raw = dict(given if given is not None else recorded if isinstance(recorded, dict) else {})
    raw = {k: v for k, v in raw.items() if k not in (":type:", ":serialized:", *UNUSED)}
    return {key: _readable(key, value, archive.path) for key, value in raw.items()}


def _readable(key: str, value: Any, path: str) -> Any:
    if key == "activation_fn" and isinstance(value, str):
        return _by_name(key, value, ACTIVATIONS, nn, path)
    if key == "features_extractor_class" and isinstance(value, str):
        from stable_baselines3.common import torch_layers

        return _by_name(key, value, EXTRACTORS, torch_layers, path)
    if isinstance(value, str) and value.startswith("<"):
        raise UserError(
            f"{path} has policy_kwargs[{key!r}] = {value}, which cannot be read without unpickling. Give the option "
            "policy_kwargs in full, or trust: true if you made this file."
        )
    return value


def _by_name(key: str, text: str, names: tuple[str, ...], home: Any, path: str) -> type:
    name = text.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    if name not in names:
        raise UserError(
            f"{path}: policy_kwargs[{key!r}] is {text}; {nearest(name, names)}. For a class of your own set "
            "trust: true if you made this file."
        )
    return getattr(home, name)


def complete_weights(weights: Weights, expected: Weights) -> Weights:
    """Weights of SB3 before 1.7 under today's names: one features extractor was then written once, not three times."""
    copies = {
        name: weights[old]
        for name in expected
        if name not in weights and (old := re.sub(r"^(pi|vf)_features", "features", name)) in weights
    }
    return {**weights, **copies}


# ---------------------------------------------------------------------------------------------------------------------
# VecNormalize
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalizer:
    """Statistics of observations by key: clip((x - mean) / sqrt(var + epsilon), -clip, clip)."""

    mean: dict[str, np.ndarray] = field(default_factory=dict)
    var: dict[str, np.ndarray] = field(default_factory=dict)
    epsilon: float = 0.0
    clip: float = 0.0

    def check(self, observation_space: Space, path: str | None) -> None:
        """Every vector must be one that the model reads, and as long."""
        known = leaves(observation_space)
        for key, mean in self.mean.items():
            if key not in known:
                raise UserError(f"normalize: {path} has statistics of {key!r}; {nearest(key, known)}")
            if mean.shape != known[key].shape:
                raise UserError(
                    f"normalize: {path} has statistics of {key!r} with shape {mean.shape}; the observation has "
                    f"{known[key].shape}. They belong to another environment."
                )


def save_normalizer(vec_normalize: Any, path: str | Path) -> None:
    """Write the observation statistics of an SB3 `VecNormalize` as a plain npz file for the option `normalize`.

    Raises:
        ValueError: it normalises rewards alone; such a model needs no file.
    """
    if not getattr(vec_normalize, "norm_obs", True):
        raise UserError("this VecNormalize has norm_obs=False: observations are not changed, leave `normalize` out")
    running = vec_normalize.obs_rms
    running = running if isinstance(running, dict) else {"observation": running}
    arrays = {f"{name}/{key}": getattr(rms, name) for key, rms in running.items() for name in ("mean", "var")}
    np.savez(path, epsilon=vec_normalize.epsilon, clip=vec_normalize.clip_obs, **arrays)


def load_normalizer(path: str | None) -> Normalizer:
    """Statistics of a file of `save_normalizer` or of `VecNormalize.save`; empty ones without a path.

    Raises:
        ValueError: no such file, or it holds no statistics of observations.
    """
    if path is None:
        return Normalizer()
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"normalize: there is no file {path!r}; expected what vec_normalize.save() or save_normalizer() of "
            "embodied_rft.agents.sb3 has written"
        )
    return _from_npz(file) if zipfile.is_zipfile(file) else _from_pickle(file)


def _from_npz(file: Path) -> Normalizer:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        parts = {
            kind: {n.partition("/")[2]: v for n, v in arrays.items() if n.startswith(f"{kind}/")}
            for kind in ("mean", "var")
        }
        return _checked(parts["mean"], parts["var"], arrays["epsilon"], arrays["clip"], file)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"normalize: {file} is no file of save_normalizer: {error}") from None


def _from_pickle(file: Path) -> Normalizer:
    """VecNormalize's own file is a pickle: its numbers are read, nothing in it runs, whatever its class."""
    try:
        saved = inert_pickle.read(file.read_bytes())
    except ValueError as error:
        raise UserError(f"normalize: {file} is no file of VecNormalize.save: {error}") from None
    state = saved.state if isinstance(saved, Inert) else {}
    if state.get("norm_obs") is False:
        raise UserError(f"normalize: {file} is of a VecNormalize with norm_obs=False: leave `normalize` out")
    running = state.get("obs_rms")
    running = running if isinstance(running, dict) else {"observation": running}
    if not all(isinstance(rms, Inert) and {"mean", "var"} <= set(rms.state) for rms in running.values()):
        raise UserError(f"normalize: {file} holds no statistics of observations; expected a file of VecNormalize.save")
    mean, var = ({key: np.asarray(rms.state[name]) for key, rms in running.items()} for name in ("mean", "var"))
    return _checked(mean, var, state.get("epsilon", 1e-8), state.get("clip_obs", 10.0), file)


def _checked(mean: dict[str, Any], var: dict[str, Any], epsilon: Any, clip: Any, file: Path) -> Normalizer:
    arrays = [*mean.values(), *var.values(), np.asarray(epsilon), np.asarray(clip)]
    if set(mean) != set(var) or not all(a.dtype.kind in "fiu" and np.isfinite(a).all() for a in arrays):
        raise UserError(f"normalize: {file} holds statistics that are no finite numbers")
    return Normalizer(mean, var, float(epsilon), float(clip))
