"""`vla`: a vision-language-action policy around any Hugging Face image-text-to-text model.

The trunk reads camera images, an instruction and the robot's state; one of three heads gives a chunk of actions:
binned tokens, a regression in one parallel pass, or a flow (see `vla_heads`). Boundary: observations to decisions and
their probabilities; knows no environment and no objective. transformers is imported when a policy is made.
Legend: N environments, B rows, H hidden size, D numbers of a chunk, U units.
"""

from __future__ import annotations

import json
import os
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft.agents.language import texts
from embodied_rft.agents.models.tiny_vlm import TinyVLMConfig
from embodied_rft.agents.models.vlm import VLM, Context, load_vlm
from embodied_rft.agents.parts.chain import Codec, Coded, Scaling
from embodied_rft.agents.parts.features import FrozenFeatures, standardized
from embodied_rft.agents.parts.vla_heads import HEADS, FlowOptions, ParallelOptions, Size, TokenOptions
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.device import drawn_on
from embodied_rft.names import UserError, nearest
from embodied_rft.networks import critics
from embodied_rft.networks.encoder import Encoder, Features, Normalize, cameras, is_image
from embodied_rft.networks.mlp import MLP
from embodied_rft.networks.trainable import LoraOptions, Train, refuse_idle_beside
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import FromNoise, HasMode, Policy, Reparametrised, Retraces, Values, able, observe, require_rng
from embodied_rft.pools.chunks import Chunk
from embodied_rft.pools.protocol import flatten_space, is_text
from embodied_rft.registry import register

HEAD_FILE = "vla_head.safetensors"
INSTRUCTION = "instruction"  # the observation key of the text
LACKS: dict[str, frozenset[type]] = {  # what a policy with this head cannot do
    "tokens": frozenset({HasMode, Reparametrised, FromNoise}),  # they have no gradient
    "parallel": frozenset({FromNoise}),
    "flow": frozenset({Retraces}),  # it cannot tell how a given chunk would have come about
}


@dataclass(config=STRICT, kw_only=True)
class VLAConfig:
    """Options of a `vla` agent."""

    model: str | dict[str, TinyVLMConfig]  # folder or hub id, or {"tiny": {...}} for random weights
    head: Literal["tokens", "parallel", "flow"] = "tokens"  # how actions come out
    tokens: TokenOptions | None = None  # options of the chosen head; those of another one are refused
    parallel: ParallelOptions | None = None  # options of head parallel
    flow: FlowOptions | None = None  # options of head flow
    fresh_head: bool = False  # begin with a new head although the model folder has one
    train: Train = "full"  # all weights, adapters, adapters and head, the head (iRe-VLA's RL stage), or nothing
    freeze_vision: bool = False  # of train "full": keep the way from pixels to image features as it is
    lora: LoraOptions = field(default_factory=LoraOptions)
    horizon: int = 1  # environment steps that a chunk holds
    execute: int | None = None  # how many of them are executed before the next decision; None: all
    statistics: Scaling = "bounds"  # what actions are scaled by
    images: tuple[str, ...] | None = None  # keys of the cameras in the order of the prompt; None: all, sorted
    state: tuple[str, ...] | None = None  # keys of state vectors, read as one token; None: all; (): none
    normalize: Normalize = False  # standardise the state: true: with statistics of the first data; running: of all
    instruction: str | None = None  # the same for all episodes; None: the observation's text "instruction"
    prompt: str | None = None  # template with {images} and {instruction}; None: that of the model's family
    value: Literal["detached", "shared", "own"] = "detached"  # what a value reads: see `make_encoder` and `value`
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the trunk's weights; log-probabilities are always computed in fp32
    gradient_checkpointing: bool = False  # compute a layer twice instead of keeping its activations
    cache_bytes: int = 2**28  # most memory for image features, kept while the vision tower is frozen

    def __post_init__(self) -> None:
        """Refuse what cannot work or has no effect."""
        for name in HEADS:
            if name != self.head and getattr(self, name) is not None:
                raise UserError(f"options {name!r} have no effect with head {self.head!r}: drop them or choose it")
        refuse_idle_beside(self, "freeze_vision")
        if not isinstance(self.model, str):
            refuse_idle(self, ["fresh_head"], "with a tiny model, whose head is always new")
        Chunk.of(self.horizon, self.execute)


@register("agent", "vla")
class VLAPolicy(Coded, Policy):
    """See docs/architecture.md for the methods.

    Example: {"id": "vla", "model": {"tiny": {}}, "head": "flow", "horizon": 4, "instruction": "reach the red dot"}.
    Units are tokens, executed steps or flow steps; the trace holds the tokens, the raw actions or the chain.
    """

    Config = VLAConfig
    spec: dict[str, Any]
    vlm: VLM
    head: Any
    state: nn.ModuleDict
    value_head: nn.ModuleDict

    def __init__(
        self, config: VLAConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.config, self.chunk = config, Chunk.of(config.horizon, config.execute)
        self._choose_keys(observation_space)
        vlm = load_vlm(config.model, dtype=config.dtype, rng=rng, prompt=config.prompt, cache_bytes=config.cache_bytes)
        reads = {"state": self.state_keys, "images": self.image_keys}
        codec = Codec(action_space, self.chunk.horizon, config.statistics, layout=reads, unit=config.head == "tokens")
        make_head, options = HEADS[config.head]
        shape = Size(codec.action_dim, self.chunk.horizon, self.chunk.execute)
        head = make_head(vlm, getattr(config, config.head) or options(), shape, rng=rng)
        # First in the state_dict, so that a checkpoint of another policy is refused before any weight is read.
        self.identity = Identity({**vlm.identity, "head": config.head, **head.identity, **_shape(shape), **reads})
        self.codec, self.vlm, self.head = codec, vlm, head
        self.state = nn.ModuleDict()
        if self.state_keys:
            reader = Encoder(observation_space, keys=self.state_keys, normalize=config.normalize, rng=rng)
            self.state = nn.ModuleDict(
                {"reader": reader, "project": critics.linear(reader.size, vlm.hidden_size, rng=rng)}
            )
        self.observation_space = observation_space
        self.value_head = nn.ModuleDict()
        if config.value == "shared":
            self.value_head["last"] = MLP(vlm.hidden_size, (256,), 1, rng=rng, last_gain=0.1)
        self.size = codec.action_dim * self.chunk.horizon
        self.num_units: int = head.num_units
        self.unit_size, self.random_start = head.unit_size, head.random_start
        self.trace_fields: dict[str, Field] = head.trace_fields
        self.stochastic = config.head != "flow"  # the entropy of a chain is none of its chunk
        self.lacks = LACKS[config.head] | (frozenset() if config.value == "shared" else {Values})
        self.lora = config.lora
        if isinstance(config.model, str) and not config.fresh_head:
            self._load_head(Path(config.model).expanduser() / HEAD_FILE)
        self.select(config.train, lora=config.lora, rng=rng)
        if config.gradient_checkpointing:
            vlm.checkpoint_layers()

    def _choose_keys(self, space: Space) -> None:
        """What is read as image, state and instruction; whatever would be left out without a word is refused."""
        leaves, config = flatten_space(space), self.config
        known = cameras(space)
        vectors = sorted(k for k, leaf in leaves.items() if not is_text(leaf) and not is_image(leaf))
        for given, some, what in ((config.images, known, "image"), (config.state, vectors, "state")):
            for key in given or ():
                if key not in some:
                    raise UserError(f"the observation has no {what} {key!r}; {nearest(key, some)}")
        self.image_keys = known if config.images is None else list(config.images)
        self._image_shapes = {key: leaves[key].shape for key in self.image_keys}
        self.state_keys = vectors if config.state is None else list(config.state)
        if not self.image_keys:
            raise UserError("a vla policy needs an image: a uint8 Box of shape [H, W, 3] in the observation space")
        has_instruction = INSTRUCTION in leaves and is_text(leaves[INSTRUCTION])
        if config.instruction is None and not has_instruction:
            raise UserError(f'the observation has no text {INSTRUCTION!r}: set the option instruction: "..."')
        for key, leaf in leaves.items():
            said = config.instruction if is_text(leaf) else config.images if is_image(leaf) else config.state
            if said is None and key not in (*self.image_keys, *self.state_keys, INSTRUCTION):
                raise UserError(
                    f"observation key {key!r} ({leaf}) would not be read: a vla reads uint8 images [H, W, 3], numbers "
                    f"and the text {INSTRUCTION!r}. If that is meant, say what it reads: the options images, state and "
                    "instruction"
                )

    def select(self, train: Train, *, lora: LoraOptions, rng: torch.Generator) -> None:
        """Choose what is trained from now on (see `tuning.tune`): the trunk, its adapters, all that is no trunk."""
        self.vlm.select(train, freeze_vision=self.config.freeze_vision, lora=lora, rng=rng)
        for part in (self.head, self.state):
            part.requires_grad_(train in ("full", "lora+head", "head"))
        self.value_head.requires_grad_(train != "frozen")  # no part of what acts

    # --- the methods of a policy ---------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are chunks [N, D] in the environment's units."""
        tensors = observe(observation, self)
        generator = None if greedy and rng is None else drawn_on(require_rng(rng), self.device)
        if not len(tensors[self.image_keys[0]]):
            trace = {name: np.zeros((0, *field.shape), field.dtype) for name, field in self.trace_fields.items()}
            return Decisions(np.zeros((0, self.size), np.float32), np.zeros((0, self.num_units), np.float32), trace)
        acted = self.head.act(self.vlm, self.context(tensors), generator, greedy=greedy)
        trace = {
            name: value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
            for name, value in acted.trace.items()
        }
        action = self.codec.decode(acted.chunk.float())
        return Decisions(action.cpu().numpy(), acted.log_prob.float().cpu().numpy(), trace)

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the traced units, [B, U] each.

        Without a trace (demonstrations) that of the action itself, where the head has one.
        """
        known = dict(trace)
        if not set(self.trace_fields) <= set(known) and able(self, Retraces) is not None:
            known = self.head.retrace(self.codec.encode(action))
        return self.head.score(self.vlm, self.context(observation), known)

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: cross-entropy of the tokens, absolute error, or flow-matching error of chunks [B, D]."""
        return self.head.loss(self.vlm, self.context(observation), self.codec.encode(action), rng, mask)

    def mode(self, observation: Tree) -> Tensor:
        """The greedy chunk [B, D], differentiable; that of a flow from zero noise."""
        return self.codec.decode(self.head.act(self.vlm, self.context(observation), None).chunk)

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A reparametrised chunk [B, D] and the log-probability [B] of how it came about."""
        acted = self.head.act(self.vlm, self.context(observation), drawn_on(require_rng(rng), self.device))
        return self.codec.decode(acted.chunk), acted.log_prob.sum(-1)

    def from_noise(self, observation: Tree, noise: Tensor) -> Tensor:
        """The chunk [B, D] that noise [B, D] becomes without further noise; differentiable in the noise."""
        return self.codec.decode(self.head.walk(self.vlm, self.context(observation), noise, None).chunk)

    def retrace(self, observation: Tree, action: np.ndarray) -> dict[str, Any]:
        """The trace of given chunks [B, D], as arrays."""
        chunk = self.codec.encode(torch.as_tensor(action, dtype=torch.float32, device=self.device))
        return {name: value.cpu().numpy() for name, value in self.head.retrace(chunk).items()}

    def context(self, observation: Tree) -> Context:
        """What the trunk reads, from a tree of tensors [B, ...] and texts."""
        for key in (*self.image_keys, *self.state_keys):
            if key not in observation:
                raise UserError(f"the observation has no {key!r}; {nearest(key, observation)}")
        images = [observation[key] for key in self.image_keys]
        for key, given in zip(self.image_keys, images, strict=True):
            if tuple(given.shape[1:]) != self._image_shapes[key]:
                raise UserError(
                    f"images of {key!r} have shape {tuple(given.shape[1:])}, this policy was made for "
                    f"{self._image_shapes[key]}: another size means another number of image tokens"
                )
        count = len(images[0])
        said = self.config.instruction
        instructions = texts(observation[INSTRUCTION]) if said is None else [said] * count
        extra = None
        if self.state_keys:
            extra = self.state["project"](self.state["reader"](observation))[:, None]
        return self.vlm.read(images, instructions, extra)

    def features(self, observation: Tree) -> Tensor:
        """What values are read from [B, H]: the last hidden state of the prompt, standardised per row."""
        return standardized(self.vlm.states(self.context(observation))[:, -1])

    def value(self, observation: Tree, trace: Tree | None = None) -> Tensor:
        """Values [B] by a head on the policy's trunk, gradients included (RL4VLA: Liu et al. 2025, section 4.1)."""
        return self.value_head["last"](self.features(observation)).squeeze(-1).float()

    def make_encoder(self, *, rng: torch.Generator) -> Features:
        """What a value of its own reads: the trunk's features without gradient, or images and state by a network."""
        if self.config.value == "own":
            return Encoder(self.observation_space, keys=[*self.image_keys, *self.state_keys], rng=rng)
        return FrozenFeatures(self, self.vlm.hidden_size)

    # --- files ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.vlm.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (adapters merged), tokenizer, head and statistics: `model: folder` continues from there.

        Raises:
            ValueError: the statistics of the data are missing.
        """
        statistics = self.codec.statistics
        if statistics is not None:
            statistics.normalise(
                "action", torch.zeros(self.codec.action_dim, device=self.device)
            )  # refuses if not fitted
        from safetensors.torch import save_file

        folder = Path(folder)
        self.vlm.save(folder)
        kept = {k: v.contiguous().cpu() for k, v in self.state_dict().items() if not k.startswith("vlm.")}
        save_file(kept, folder / (HEAD_FILE + ".part"))
        os.replace(folder / (HEAD_FILE + ".part"), folder / HEAD_FILE)

    def _load_head(self, path: Path) -> None:
        if not path.exists():
            return
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): save it again, or start with fresh_head: true") from error
        bad = [name for name, value in saved.items() if value.is_floating_point() and not bool(value.isfinite().all())]
        if bad:
            raise UserError(f"{path} has NaN or infinity in {', '.join(bad[:3])}: take an earlier checkpoint")
        for name, part in self.named_children():
            if name != "vlm":
                own = {k.removeprefix(name + "."): v for k, v in saved.items() if k.startswith(name + ".")}
                part.load_state_dict(own)
        statistics = self.codec.statistics
        if statistics is not None and not bool(statistics.fitted):
            raise UserError(f"{path} was saved without statistics of its data: fit them and save it again")


class Identity(nn.Module):
    """What a checkpoint's weights belong to, as a buffer that is compared by name before anything is loaded."""

    text: Tensor  # [n] uint8, JSON

    def __init__(self, parts: dict[str, Any]) -> None:
        super().__init__()
        self.parts = parts
        data = json.dumps(parts, sort_keys=True).encode()
        self.register_buffer("text", torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "text")
        if given is None:
            raise UserError("the checkpoint is not one of a vla policy: it does not say which model it belongs to")
        try:
            saved = json.loads(bytes(given.cpu().tolist()))
        except ValueError:
            raise UserError("the checkpoint does not say which model it belongs to: it is damaged") from None
        for name, own in self.parts.items():
            if saved.get(name) != own:
                raise UserError(
                    f"the checkpoint belongs to another policy: its {name} is {saved.get(name)!r}, this one's is "
                    f"{own!r}. Build the policy with the model and options that it was saved with."
                )


def _shape(size: Size) -> dict[str, int]:
    return {"action_dim": size.action_dim, "horizon": size.horizon}
