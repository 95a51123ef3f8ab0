"""What LeRobot keeps beside a policy: units of observations and actions, read from its files without LeRobot.

Since LeRobot 0.4 a folder holds `policy_preprocessor.json` and `policy_postprocessor.json`, lists of steps with their
numbers in safetensors files; before, the numbers were buffers of the model (`normalize_inputs.*`). A policy without
them acts in wrong units, so a folder either gives a complete pair of processors or is refused. Boundary: batches of
tensors in LeRobot's names; knows no policy class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embodied_rft.names import UserError

Batch = dict[str, Any]
Step = Callable[[Batch], Batch]  # a batch of observations, or {"action": [..., A]}

NAMES = {"pre": "policy_preprocessor.json", "post": "policy_postprocessor.json"}
BUFFERS = {"pre": "normalize_inputs.buffer_", "post": "unnormalize_outputs.buffer_"}
STATISTICS = {  # what each mode needs; all but the first map [a, b] to [-1, 1]
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


@dataclass(frozen=True)
class Processors:
    """A pair of functions on batches: into the policy's units, and its actions out of them."""

    pre: Step
    post: Step


def load_processors(folder: str | Path, config: Mapping[str, Any]) -> Processors | None:
    """The processors of a policy folder; None where the policy works in the units that it is given.

    Args:
        folder: of the policy.
        config: the content of its config.json.

    Raises:
        ValueError: a step that is not known here, missing or damaged statistics, or a policy that needs normalised
            numbers and has no statistics at all.
    """
    folder = Path(folder)
    given = {part: folder / name for part, name in NAMES.items() if (folder / name).is_file()}
    if len(given) == 2:
        return Processors(**{part: _chain(_read_steps(file)) for part, file in given.items()})
    if given:
        missing = next(name for part, name in NAMES.items() if part not in given)
        raise UserError(f"{folder} has only one of its two processors: {missing} is missing. Copy the whole folder.")
    modes = {kind: str(mode) for kind, mode in (config.get("normalization_mapping") or {}).items()}
    if all(mode == "IDENTITY" for mode in modes.values()):
        return None
    return _from_buffers(folder, config, modes)


def _chain(steps: list[Step]) -> Step:
    def run(batch: Batch) -> Batch:
        for step in steps:
            batch = step(batch)
        return batch

    return run


def _read_steps(file: Path) -> list[Step]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = [(entry.get("registry_name") or entry.get("class"), entry) for entry in content["steps"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no processor of LeRobot: {error}") from None
    steps = []
    for name, entry in entries:
        if name not in KNOWN:
            raise UserError(
                f"{file.name} of {file.parent} has the step {name!r}, which is not known here ({', '.join(KNOWN)}): "
                "without it the numbers would be others. Wrap the policy in a class of your own that "
                "does this step and give that as option policy, with the two JSON files taken out of the folder."
            )
        state = {} if entry.get("state_file") is None else _read_tensors(file.parent / Path(entry["state_file"]).name)
        step = KNOWN[name](f"step {name!r} of {file}", entry.get("config") or {}, state)
        if step is not None:
            steps.append(step)
    return steps


def _read_tensors(file: Path, prefix: str = "") -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            return {
                key.removeprefix(prefix): content.get_tensor(key).float()
                for key in content.keys()
                if key.startswith(prefix)
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. Copy the whole policy folder.") from None


def _rename(what: str, config: Mapping[str, Any], _: Mapping[str, Tensor]) -> Step | None:
    names = config.get("rename_map") or {}
    return (lambda batch: {names.get(key, key): value for key, value in batch.items()}) if names else None


def _nothing(what: str, config: Mapping[str, Any], _: Mapping[str, Tensor]) -> None:
    """A step that is done elsewhere: batches are batches already, and the agent minds the device."""
    dtype = config.get("float_dtype")
    if dtype not in (None, "float32"):
        raise UserError(f"{what} casts to {dtype}: only float32 is done here; save the policy with that")


def _normalise(what: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Step:
    return _Scaling(what, config, state, inverse=False)


def _unnormalise(what: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Step:
    return _Scaling(what, config, state, inverse=True)


KNOWN: dict[str, Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], Step | None]] = {
    "rename_observations_processor": _rename,
    "to_batch_processor": _nothing,
    "device_processor": _nothing,
    "normalizer_processor": _normalise,
    "unnormalizer_processor": _unnormalise,
}


class _Scaling:
    """LeRobot's normaliser, or its inverse: per key x -> (x - shift) / scale.

    MEAN_STD: (x - mean) / (std + eps), back without eps, as LeRobot does. The others: [a, b] to [-1, 1], and where
    b = a the range is eps.
    """

    def __init__(self, what: str, config: Mapping[str, Any], state: Mapping[str, Tensor], *, inverse: bool) -> None:
        modes, eps, chosen = (
            config.get("norm_map") or {},
            float(config.get("eps", 1e-8)),
            config.get("normalize_observation_keys"),
        )
        self.inverse = inverse
        self.numbers: dict[str, tuple[Tensor, Tensor]] = {}
        for key, feature in (config.get("features") or {}).items():
            mode = str(modes.get(feature["type"], "IDENTITY"))
            if mode == "IDENTITY" or (chosen is not None and feature["type"] != "ACTION" and key not in chosen):
                continue
            if mode not in STATISTICS:
                raise UserError(
                    f"{what} normalises {key!r} by {mode}, which is not known here: {', '.join(STATISTICS)}"
                )
            names = [f"{key}.{name}" for name in STATISTICS[mode]]
            missing = [name for name in names if name not in state]
            if missing:
                raise UserError(f"{what} has no statistics {missing[0]!r}; the policy's units cannot be known")
            first, second = (state[name] for name in names)
            if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
                raise UserError(
                    f"{what} has statistics of {key!r} that are not finite: they were never taken from data"
                )
            if feature["type"] == "VISUAL" and first.dim() == 1:
                first, second = first[:, None, None], second[:, None, None]
            if mode == "MEAN_STD":
                shift, scale = first, second if inverse else second + eps
            else:
                width = torch.where(second == first, eps, second - first)
                shift, scale = first + width / 2, width / 2
            self.numbers[key] = shift, scale

    def __call__(self, batch: Batch) -> Batch:
        done = dict(batch)
        for key, numbers in self.numbers.items():
            if key in batch:
                shift, scale = (part.to(batch[key].device) for part in numbers)
                done[key] = batch[key] * scale + shift if self.inverse else (batch[key] - shift) / scale
        return done


def _from_buffers(folder: Path, config: Mapping[str, Any], modes: Mapping[str, str]) -> Processors:
    """Of a folder from before processors: the buffers of the model, whose names have underscores for dots."""
    file = folder / "model.safetensors"
    features = {"pre": config.get("input_features") or {}, "post": config.get("output_features") or {}}
    steps = {}
    for part, prefix in BUFFERS.items():
        buffers = _read_tensors(file, prefix) if file.is_file() else {}
        if not buffers:
            raise UserError(
                f"{folder} was trained on normalised numbers ({modes}) and holds no statistics of them: neither "
                f"{NAMES[part]} nor {prefix}* in model.safetensors. Save the processors into it as LeRobot's training "
                "does (preprocessor.save_pretrained(folder), postprocessor.save_pretrained(folder))."
            )
        short = {key.replace(".", "_"): key for key in features[part]}
        state = {}
        for name, value in buffers.items():
            key, _, statistic = name.rpartition(".")
            state[f"{short.get(key, key)}.{statistic}"] = value
        made = {"features": features[part], "norm_map": modes}
        steps[part] = _Scaling(f"model.safetensors of {folder}", made, state, inverse=part == "post")
    return Processors(**steps)
