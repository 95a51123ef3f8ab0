"""`lerobot`: a policy object with LeRobot's interface as a frozen base (`residual`, `queued` or evaluation as it is).

Any object with `predict_action_chunk(batch)` or `select_action(batch)` and `reset()` will do; LeRobot itself is
optional and imported only to find the class of a policy folder that names none. Boundary: names, units and histories
are translated here (`lerobot_processors` reads the units); nothing is trained.

Legend: N environments, B rows, T observations of a history, H horizon, A action dimensions.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field as Option
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft.agents.models.lerobot_processors import Batch, load_processors
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.trainable import freeze
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, observe
from embodied_rft.pools.chunks import Chunk
from embodied_rft.pools.protocol import flatten_space
from embodied_rft.registry import register

logger = logging.getLogger(__name__)

IMAGES = "observation.images"  # under this name queues hold all cameras of a policy, stacked


@dataclass(config=STRICT, kw_only=True)
class LeRobotConfig:
    """Options of a `lerobot` agent."""

    path: str  # folder (config.json, model.safetensors) or hub id, given to from_pretrained
    policy: str | None = None  # "package.module:Class"; None: LeRobot's class for the "type" in config.json
    horizon: int = 1  # H, steps of a predicted chunk that are used
    execute: int | None = None  # steps until the next prediction; None: all H
    # From our observation keys to the policy's: state vectors in the units of the policy's data, images as [0, 1].
    keys: dict[str, str] = Option(  # our observation keys: the policy's
        default_factory=lambda: {"observation": "observation.state"}
    )
    task: str | None = None  # instruction given with every observation, for policies that read language


@register("agent", "lerobot")
class LeRobotPolicy(Policy):
    """Acts as the wrapped policy does, without gradients; its log-probability is 0, because nothing is known of it.

    Observations pass the folder's preprocessor, actions its postprocessor. A chunk is predicted for every decision, and
    nothing is remembered between decisions: a policy that looks at T > 1 observations reads them from the observation
    itself, which `env: {wrappers: [{id: FrameStackObservation, stack_size: T}]}` gives. Noise that a policy draws is
    seeded by `rng`, or for greedy decisions by the observation.

    Example: {"id": "lerobot", "path": "my_robot/act", "horizon": 50, "execute": 10}.
    """

    Config = LeRobotConfig
    num_units = 1
    stochastic = False
    trace_fields: dict[str, Field] = {}  # noqa: RUF012
    spec: dict[str, Any]

    def __init__(
        self, config: LeRobotConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
            raise UserError(f"action space {action_space}: a Box of shape (A,) is expected")
        boxes = flatten_space(observation_space)
        for key in config.keys:
            if key not in boxes:
                raise UserError(f"keys of agent 'lerobot': there is no observation {key!r}; {nearest(key, boxes)}")
        self.config, self.chunk = config, Chunk.of(config.horizon, config.execute)
        self.size = (self.chunk.horizon, action_space.shape[0])  # of a prediction
        self.policy: Any = load_policy(config.path, config.policy)
        if self.chunk.horizon > 1 and not hasattr(self.policy, "predict_action_chunk"):
            raise UserError(f"{type(self.policy).__name__} has no predict_action_chunk: set horizon to 1")
        if isinstance(self.policy, nn.Module):
            freeze(self.policy)
        folder = Path(config.path).expanduser()
        self.processors = load_processors(folder, read_config(folder)) if self._needs_units(folder) else None
        self.history = history_of(self.policy)
        self._check_observations(boxes)

    def _needs_units(self, folder: Path) -> bool:
        """Whether units are to be translated here: before 0.4 policies did it themselves.

        Raises:
            ValueError: the policy needs normalised numbers, and there is no folder to read their statistics from.
        """
        if hasattr(self.policy, "normalize_inputs"):
            return False
        mapping = getattr(getattr(self.policy, "config", None), "normalization_mapping", None) or {}
        modes = {getattr(mode, "value", mode) for mode in mapping.values()}
        if not folder.is_dir() and modes - {"IDENTITY"}:
            raise UserError(
                f"{self.config.path!r} is no folder here, so the statistics of its data cannot be read: download the "
                "policy first and give its folder as path"
            )
        return folder.is_dir()

    def _check_observations(self, boxes: Mapping[str, Space]) -> None:
        """Everything that the policy reads must be given, with its history."""
        reads = getattr(getattr(self.policy, "config", None), "input_features", None) or {}
        for theirs in reads:
            if theirs not in self.config.keys.values():
                raise UserError(
                    f"{type(self.policy).__name__} reads {theirs!r}: say in keys which observation that is, as in "
                    f"keys: {{{next(iter(boxes))}: {theirs}}}; the environment has {', '.join(boxes)}"
                )
        if self.history == 1:
            return
        looks = f"{type(self.policy).__name__} looks at the last {self.history} observations"
        for ours in self.config.keys:
            shape = boxes[ours].shape or ()
            if len(shape) < 2 or shape[0] != self.history:
                raise UserError(
                    f"{looks}, and {ours!r} has shape {shape}: [{self.history}, ...] is expected. Stack them in the "
                    f"environment, env: {{wrappers: [{{id: FrameStackObservation, stack_size: {self.history}}}]}}"
                )
        if not hasattr(self.policy, "_queues") or not hasattr(self.policy, "predict_action_chunk"):
            raise UserError(
                f"{looks}, but has no queues that they could be put in; only single observations are supported for it"
            )
        if hasattr(self.policy, "normalize_inputs"):
            raise UserError("policies with a history of LeRobot before 0.4 are not supported: load it with a newer one")

    def translate(self, observation: Mapping[str, Tensor], step: int | None = None) -> Batch:
        """Our tree of tensors [B, ...] as the batch that the policy reads; `step` is one of a history [B, T, ...]."""
        batch: Batch = {}
        for ours, theirs in self.config.keys.items():
            value = observation[ours] if step is None else observation[ours][:, step]
            image = value.dtype == torch.uint8 and value.dim() == 4
            if image and value.shape[-1] in (1, 3, 4):
                value = value.permute(0, 3, 1, 2)
            batch[theirs] = value.float() / 255 if image else value.float()
        if self.config.task is not None:
            batch["task"] = [self.config.task] * len(value)
        return batch if self.processors is None else self.processors.pre(batch)

    def _predict(self, observation: Tree) -> Tensor:
        """[B, steps, A] in the policy's units."""
        if not hasattr(self.policy, "predict_action_chunk"):
            self.policy.reset()
            return self.policy.select_action(self.translate(observation))[:, None]
        queues = getattr(self.policy, "_queues", None)
        if not queues:
            return self.policy.predict_action_chunk(self.translate(observation))
        self.policy.reset()  # makes the queues anew; nothing of an earlier decision is left
        queues = self.policy._queues
        for step in range(self.history):
            batch = self.translate(observation, None if self.history == 1 else step)
            if IMAGES in queues:
                cameras = self.policy.config.image_features
                batch[IMAGES] = torch.stack([batch[key] for key in cameras], dim=-4)
            for key in batch.keys() & queues.keys():
                queues[key].append(batch[key])
        return self.policy.predict_action_chunk(batch)

    @torch.no_grad()
    def mode(self, observation: Tree) -> Tensor:
        """The predicted chunk [B, H * A].

        Raises:
            ValueError: the prediction has another shape than the environment's actions.
        """
        read = [observation[key] for key in self.config.keys]
        seed = zlib.crc32(b"".join(value.detach().cpu().contiguous().numpy().tobytes() for value in read))
        return self._chunk(observation, seed)

    def _chunk(self, observation: Tree, seed: int) -> Tensor:
        with lent_generators(seed):
            chunk = self._predict(observation)[:, : self.chunk.horizon]
        if tuple(chunk.shape[1:]) != self.size:
            raise UserError(
                f"{type(self.policy).__name__} predicts {tuple(chunk.shape[1:])} (steps, action dimensions); this "
                f"agent needs {self.size}. Is horizon too long, or was the policy trained for "
                "another robot?"
            )
        if self.processors is not None:
            chunk = self.processors.post({"action": chunk.float()})["action"]
        return chunk.float().flatten(1)

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are [N, H * A]."""
        holder = self if next(self.parameters(), None) is not None else nn.Linear(1, 1)  # only its device is looked at
        tensors = observe(observation, holder)
        if greedy or rng is None:
            chunk = self.mode(tensors)
        else:
            chunk = self._chunk(tensors, int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        action = chunk.cpu().numpy()
        return Decisions(action, np.zeros((len(action), 1), dtype=np.float32))

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Zeros [B, 1]: the wrapped policy has no log-probability."""
        zeros = torch.zeros(len(action), 1, device=action.device)
        return zeros, zeros


@contextlib.contextmanager
def lent_generators(seed: int) -> Iterator[None]:
    """Policies draw from the global generators: lend them a seed, and put them back as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def history_of(policy: Any) -> int:
    """T, how many observations a policy looks at: what its configuration says, or the length of its queues."""
    config = getattr(policy, "config", None)
    told = getattr(config, "n_obs_steps", None)
    if getattr(config, "temporal_ensemble_coeff", None) is not None:
        logger.warning(
            "%s averages overlapping chunks (temporal ensembling), which is not done here: chunks are "
            "executed as they are predicted, `execute` steps of each",
            type(policy).__name__,
        )
    queues = getattr(policy, "_queues", None) or {}
    lengths = [queue.maxlen or 1 for key, queue in queues.items() if str(key).startswith("observation")]
    return max(int(told or 1), *lengths, 1)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; {} where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, expected the mapping of a policy's configuration")
    return content


def load_policy(path: str, policy: str | None) -> Any:
    """The policy object of a folder or hub id, by `from_pretrained` of its class.

    Raises:
        ValueError: the class cannot be found, has not the interface, or LeRobot would be needed and is not installed.
    """
    cls = import_class(policy) if policy is not None else lerobot_class(path)
    if not hasattr(cls, "from_pretrained"):
        raise UserError(f"{cls!r} has no from_pretrained: it does not follow LeRobot's policy interface")
    loaded = cls.from_pretrained(path)
    if not hasattr(loaded, "predict_action_chunk") and not (
        hasattr(loaded, "select_action") and hasattr(loaded, "reset")
    ):
        raise UserError(f"{cls.__name__} has neither predict_action_chunk nor select_action and reset")
    return loaded


def import_class(name: str) -> type:
    """The class that "package.module:Class" names."""
    module, _, attribute = name.partition(":")
    try:
        found: type = getattr(importlib.import_module(module), attribute)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"policy {name!r} cannot be imported ({error}); expected 'package.module:Class'") from None


def lerobot_class(path: str) -> type:
    """LeRobot's own class for the "type" that the folder's config.json names."""
    file = Path(path).expanduser() / "config.json"
    try:
        factory = importlib.import_module("lerobot.policies.factory")
    except ImportError:
        raise UserError(
            f"the policy {path!r} names no class of its own and LeRobot is not installed: install it as "
            "docs/foreign.md says, or set policy: 'package.module:Class' to any class with LeRobot's interface"
        ) from None
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a local folder, or set policy to the class of the hub id")
    kind = read_config(file.parent).get("type")
    if kind is None:
        raise UserError(f"{file} has no 'type': set policy: 'package.module:Class'")
    return factory.get_policy_class(kind)
