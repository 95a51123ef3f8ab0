"""Statistics of a robot's data: fitted once, saved with the weights, hashed, refused when they do not belong.

Most silent failures of imitation policies are statistics of another data set or robot. So they travel in the
state_dict as buffers with two digests: one of the layout (which vectors, how long, with which bounds) and one of the
numbers. Boundary: knows vectors by name, no policy and no loss. Action-chunk policies and VLAs use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft.names import UserError, nearest

Kind = Literal["min_max", "quantile", "mean_std"]
PARTS = ("center", "scale", "low", "high")
REACH = {"min_max": 1.0, "quantile": 1.5, "mean_std": 5.0}  # how far normalised numbers reach at least
LARGEST = 8.0  # data that would reach further is scaled by its extremes: a rare event would be all of the loss
CONSTANT = 1e-6  # range of a dimension that does not vary, relative to its size: rounding of fp32


class Statistics(nn.Module):
    """Shift and scale of named vectors, one pair per dimension.

    With kind "min_max", an action dimension that the data moves between 0.2 and 0.6 gets centre 0.4 and scale 0.2, so
    that `normalise` gives [-1, 1]. Nothing that occurs in the data lies outside of what `clip` lets through: `low` and
    `high` are the data's extremes after normalisation, or -+1 (min_max), -+1.5 (quantile), -+5 (mean_std), whichever is
    further. Where an extreme would be larger than 8, that dimension is scaled by its extremes instead. A dimension that
    does not vary has scale 1 and is clipped to its one value.

    Args:
        sizes: length of each vector by name, e.g. {"action": 4}.
        kind: "min_max" (the data's range becomes [-1, 1]), "quantile" (its 1 % to 99 % range does) or "mean_std"
            (mean 0 and deviation 1).
        layout: JSON that identifies the robot: what must be equal where the statistics are used. Sizes and kind
            always count.
    """

    fitted: Tensor  # bool
    digest: Tensor  # [32] uint8, SHA-256 of the numbers
    layout: Tensor  # [32] uint8, SHA-256 of what they belong to

    def __init__(self, sizes: Mapping[str, int], *, kind: Kind = "min_max", layout: Mapping[str, Any] | None = None):
        super().__init__()
        self.sizes, self.kind = dict(sizes), kind
        for name, size in self.sizes.items():
            self.register_buffer(f"center/{name}", torch.zeros(size))
            self.register_buffer(f"scale/{name}", torch.ones(size))
            self.register_buffer(f"low/{name}", -torch.ones(size))
            self.register_buffer(f"high/{name}", torch.ones(size))
        text = json.dumps({"sizes": self.sizes, "kind": kind, **(layout or {})}, sort_keys=True)
        self.register_buffer("layout", _sha256(text.encode()))
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, data: Mapping[str, Tensor], *, extremes: Mapping[str, Tensor] | None = None) -> None:
        """Take the statistics of data [..., size] by name.

        Args:
            data: all of it, or a part that is spread evenly.
            extremes: smallest and largest values [2, size] of all data, where `data` is a part.

        Raises:
            ValueError: they were fitted before, a vector is missing, has another size, or holds NaN or infinity.
        """
        if bool(self.fitted):
            raise UserError("the statistics are fitted already; a policy keeps those that it was trained with")
        for name, size in self.sizes.items():
            if name not in data:
                raise UserError(f"statistics of {name!r} need its data; {nearest(name, data)}")
            values = torch.as_tensor(data[name]).float()
            if values.shape[-1] != size or values.numel() == 0:
                raise UserError(
                    f"data of {name!r} has shape {tuple(values.shape)}; expected at least one [..., {size}]"
                )
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"data of {name!r} holds NaN or infinity: clean it before taking statistics")
            values = values.reshape(-1, size)
            whole = values if extremes is None else torch.cat([values, torch.as_tensor(extremes[name]).float().cpu()])
            for part, numbers in zip(PARTS, _fit(values, whole.amin(0), whole.amax(0), self.kind), strict=True):
                self.get_buffer(f"{part}/{name}").copy_(numbers)
        self.fitted.fill_(True)
        self.digest.copy_(self._compute_digest(dict(self.named_buffers())))

    def normalise(self, name: str, value: Tensor) -> Tensor:
        """Data units [..., size] to about [-1, 1] (or zero mean, unit variance)."""
        self._require_fitted()
        return (value - self.get_buffer(f"center/{name}")) / self.get_buffer(f"scale/{name}")

    def denormalise(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        self._require_fitted()
        return torch.addcmul(self.get_buffer(f"center/{name}"), value, self.get_buffer(f"scale/{name}"))

    def clip(self, name: str, value: Tensor) -> Tensor:
        """Normalised numbers [..., size] within what the data reaches."""
        self._require_fitted()
        return torch.minimum(torch.maximum(value, self.get_buffer(f"low/{name}")), self.get_buffer(f"high/{name}"))

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the digest, for reports."""
        return _hash(self.digest)

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise UserError(
                "the policy has no statistics of its data yet: call policy.fit_statistics(buffer) before imitation, or "
                "load a checkpoint that has them"
            )

    def _compute_digest(self, numbers: Mapping[str, Any]) -> Tensor:
        names = [f"{part}/{name}" for name in sorted(self.sizes) for part in PARTS]
        return _sha256(b"".join(numbers[n].detach().cpu().numpy().astype("<f4").tobytes() for n in names))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {name: state_dict.get(prefix + name) for name in dict(self.named_buffers())}
        missing = [name for name, value in own.items() if value is None]
        if missing:
            raise UserError(
                f"the checkpoint has no statistics {missing[0]!r}: it was saved by a policy without them. Load the "
                "statistics it was trained with, or train it again."
            )
        for name, size in self.sizes.items():
            given = tuple(own[f"center/{name}"].shape)
            if given != (size,):
                raise UserError(f"the checkpoint's statistics of {name!r} have shape {given}; this robot has ({size},)")
        if not torch.equal(own["layout"].cpu(), self.layout.cpu()):
            raise UserError(
                "the checkpoint's statistics belong to another robot or data set: observation keys, action bounds or "
                "the kind of normalisation differ. Use the checkpoint with the environment that it was trained for."
            )
        digest = own["digest"].cpu()
        if bool(own["fitted"]) and not torch.equal(self._compute_digest(own), digest):
            raise UserError("the checkpoint's statistics do not match their own hash: the file was changed or damaged")
        if bool(self.fitted) and not torch.equal(self.digest.cpu(), digest):
            raise UserError(
                f"the checkpoint's statistics (hash {_hash(digest)}) differ from those that this policy was trained "
                f"with ({self.hash}): the weights would see other units. Load into a fresh policy."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)  # only now: a refused file changes nothing


def _fit(values: Tensor, low: Tensor, high: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, scale and the normalised extremes, [size] each, of values [rows, size] in [low, high]."""
    first, last = low.double(), high.double()
    center, scale = middle, half = (first + last) / 2, (last - first) / 2
    if kind == "mean_std":
        center, scale = values.double().mean(0), values.double().std(0, correction=0)
    elif kind == "quantile":
        ends = [torch.from_numpy(np.quantile(values.cpu().numpy().astype(np.float64), q, axis=0)) for q in (0.01, 0.99)]
        center, scale = (ends[1] + ends[0]) / 2, (ends[1] - ends[0]) / 2
    far = torch.maximum(last - center, center - first) > LARGEST * scale
    center, scale = torch.where(far, middle, center), torch.where(far, half, scale)
    limit = torch.where(far, REACH["min_max"], REACH[kind])
    constant = 2 * half <= CONSTANT * torch.maximum(first.abs(), last.abs())
    center, scale = torch.where(constant, middle, center).float(), torch.where(constant, 1.0, scale).float()
    ends = [torch.where(constant, 0.0, sign * limit).float() for sign in (-1, 1)]
    reached_low, reached_high = (low - center) / scale, (high - center) / scale  # rounded as `normalise` rounds
    return center, scale, torch.minimum(ends[0], reached_low), torch.maximum(ends[1], reached_high)


def _hash(digest: Tensor) -> str:
    return bytes(digest.cpu().tolist()).hex()[:16]


def _sha256(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(data).digest()), dtype=torch.uint8)
