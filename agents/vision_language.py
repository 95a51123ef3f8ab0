"""`vision_language`: a vision-language model that answers in text about what it sees. One unit a token of its reply.

Any Hugging Face image-text-to-text model, by folder or hub id, or a tiny random one. As in `language`, what was sampled
is what is trained: the trace holds the ids. Boundary: images and text in, text out, log-probabilities of stored ids;
knows no reward and no objective. Rows with the same images and text read them once, with gradients; turns that continue
one another do not (`language` shares those, too, but sees no image).
Legend: N observations, B rows, P tokens of a prompt, U reply tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.language import text_key, texts
from embodied_rft.agents.models.causal_lm import CausalLM
from embodied_rft.agents.models.feature_cache import content_keys
from embodied_rft.agents.models.tiny_vlm import TinyVLMConfig
from embodied_rft.agents.models.vlm import Context, load_vlm
from embodied_rft.agents.parts.features import FrozenFeatures, standardized
from embodied_rft.data import CUT, Decisions, Field, Ragged, Space, Tree
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.encoder import cameras
from embodied_rft.networks.trainable import LoraOptions, Train, refuse_idle_beside
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, observe, require_rng
from embodied_rft.pools.protocol import flatten_space
from embodied_rft.pools.spaces import what_suits
from embodied_rft.pools.text_spaces import ChatText
from embodied_rft.registry import register
from embodied_rft.tokens.log_probs import token_log_probs


@dataclass(config=STRICT, kw_only=True)
class VisionLanguageConfig:
    """Options of a `vision_language` agent."""

    model: str | dict[str, TinyVLMConfig]  # folder or hub id, or {"tiny": {...}} for random weights
    images: tuple[str, ...] | None = None  # keys of the images in the order of the prompt; None: all, sorted
    key: str | None = None  # key of the text; None: "prompt", or the only text there is
    prompt: str | None = None  # template with {images} and {instruction} (the text); None: that of a robot's model
    max_new_tokens: int = 16  # a reply that reaches it is cut, and marked so in the trace
    temperature: float = 1.0  # of sampling and of every log-probability
    train: Train = "full"  # all weights, adapters, adapters and output layer, output layer, nothing
    freeze_vision: bool = False  # of train "full": keep the way from pixels to image features as it is
    lora: LoraOptions = field(default_factory=LoraOptions)
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights; log-probabilities are always computed in fp32
    cache_bytes: int = 2**28  # most memory for image features, kept while the vision tower is frozen

    def __post_init__(self) -> None:
        """Refuse what cannot work or has no effect."""
        refuse_idle_beside(self, "freeze_vision")
        if not 0 < self.temperature < math.inf or self.max_new_tokens < 1:
            raise UserError(f"temperature > 0 and max_new_tokens >= 1 are expected, given {self}")


@register("agent", "vision_language")
class VisionLanguagePolicy(Policy):
    """See docs/architecture.md for the methods.

    Trace: "reply" are token ids, "cut" says that the reply ran into `max_new_tokens`.
    """

    Config = VisionLanguageConfig
    num_units = None
    trace_fields = {"reply": Field((), "int64", "ragged"), CUT: Field((), "bool")}  # noqa: RUF012
    spec: dict[str, Any]

    def __init__(
        self,
        config: VisionLanguageConfig,
        *,
        observation_space: Space,
        action_space: Space,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, gym.spaces.Text):
            raise UserError(
                f"action space {action_space}: this agent answers in text, a Text space is expected. "
                f"{what_suits(action_space)}"
            )
        known = cameras(observation_space)
        self.image_keys = known if config.images is None else list(config.images)
        for key in self.image_keys:
            if key not in known:
                raise UserError(f"the observation has no image {key!r}; {nearest(key, known)}")
        if not self.image_keys:
            raise UserError("there is no image to see: a uint8 Box of shape [H, W, 3] is expected; else use `language`")
        self.config, self.key = config, text_key(observation_space, config.key, also=self.image_keys)
        if isinstance(flatten_space(observation_space)[self.key], ChatText):
            raise UserError("prompts are lists of messages here; this agent reads one text beside its images")
        self.vlm = load_vlm(
            config.model, dtype=config.dtype, rng=rng, prompt=config.prompt, cache_bytes=config.cache_bytes
        )
        self.lm = CausalLM(self.vlm.model, self.vlm.tokenizer, continues=False)  # the trunk does, with its images
        self._end = self.lm.end_of("chat")
        self.lora = config.lora
        self.select(config.train, lora=config.lora, rng=rng)

    def select(self, train: Train, *, lora: LoraOptions, rng: torch.Generator) -> None:
        """Choose what is trained from now on (see `tuning.tune`); the head is the output layer."""
        layer = self.vlm.model.get_output_embeddings()
        if "head" in train and layer.weight is self.vlm.model.get_input_embeddings().weight:
            raise UserError(
                f'train "{train}": the output layer is the input embedding, too; use train "lora" or "full"'
            )
        self.vlm.select(train, freeze_vision=self.config.freeze_vision and train == "full", lora=lora, rng=rng)
        layer.requires_grad_(train in ("full", "lora+head", "head"))

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N replies to what `observation` shows and asks."""
        from embodied_rft.tokens.generation import Sampling, draw

        if not len(texts(observation[self.key])):
            none = Ragged.of([], dtype=np.int64)
            return Decisions([], Ragged.of([], dtype=np.float32), {"reply": none, CUT: np.zeros(0, dtype=bool)})
        context, kind = self._distinct(observe(observation, self))
        self.vlm.check_length(context, self.config.max_new_tokens)
        generator = None if greedy else require_rng(rng)
        head, sampling = self.lm.head(self.config.temperature), Sampling(eos=self.lm.eos)
        hidden, decoding = self.vlm.start(context)
        rows, count = torch.from_numpy(kind).to(hidden.device), len(kind)
        decoding.take(rows)
        last = hidden[rows, -1]
        ids: list[list[int]] = [[] for _ in range(count)]
        log_probs: list[list[float]] = [[] for _ in range(count)]
        open_ = np.ones(count, dtype=bool)
        for number in range(self.config.max_new_tokens):
            token, log_prob = draw(head.logits(last), sampling, generator, self.lm.allowed)
            for row in np.flatnonzero(open_):
                ids[row].append(int(token[row]))
                log_probs[row].append(float(log_prob[row]))
                open_[row] = ids[row][-1] not in self.lm.eos
            if number + 1 == self.config.max_new_tokens or not open_.any():
                break
            last = decoding.step(self.vlm.model.get_input_embeddings()(token))
        replies = Ragged.of(ids, dtype=np.int64)
        said = [str(self.vlm.tokenizer.decode(reply.tolist(), skip_special_tokens=True)) for reply in replies]
        return Decisions(said, Ragged.of(log_probs, dtype=np.float32), {"reply": replies, CUT: open_})

    def log_prob(self, observation: Tree, action: Sequence[str], trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every reply token, [B, U] each, zero behind the end of a reply."""
        replies = (trace if "reply" in trace else self.retrace(observation, action))["reply"]
        self.lm.check_ids(replies.values)
        context, kind = self._distinct(observation)
        device = context.embeddings.device
        if not len(replies.values):
            nothing = context.embeddings.new_zeros((len(replies), 0), dtype=torch.float32)
            return nothing, nothing
        ids, mask = (torch.from_numpy(part).to(device) for part in replies.pad(0))
        hidden = self.vlm.continued(context, self.vlm.model.get_input_embeddings()(ids[:, :-1]), kind)
        flat = token_log_probs(hidden[mask], ids[mask], self.lm.head(self.config.temperature))
        log_prob, entropy = (torch.zeros(mask.shape, device=device).masked_scatter(mask, part) for part in flat)
        return log_prob, entropy

    def imitation_loss(
        self,
        observation: Tree,
        action: Sequence[str],
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: mean cross-entropy of the tokens of given replies."""
        replies = self.retrace(observation, action)["reply"]
        log_prob, _ = self.log_prob(observation, action, {"reply": replies})
        return -log_prob.sum(1) / torch.from_numpy(replies.lengths).to(log_prob.device)

    def retrace(self, observation: Tree, action: Sequence[str]) -> dict[str, Any]:
        """The trace of given replies: their ids, with an end token."""
        tokenizer = self.vlm.tokenizer
        ids = [[*tokenizer(t, add_special_tokens=False)["input_ids"], self._end] for t in texts(action)]
        return {"reply": Ragged.of(ids, dtype=np.int64), CUT: np.zeros(len(ids), dtype=bool)}

    def context(self, observation: Tree) -> Context:
        """What the trunk reads, from a tree of tensors [B, ...] and texts."""
        return self.vlm.read([observation[key] for key in self.image_keys], texts(observation[self.key]))

    def _distinct(self, observation: Tree) -> tuple[Context, np.ndarray]:
        """Every prompt (images and text) once, and which one each row has [B]."""
        images, said = [observation[key] for key in self.image_keys], texts(observation[self.key])
        if any(len(camera) != len(said) for camera in images):
            return self.vlm.read(images, said), np.arange(len(said))  # which says what is wrong
        known: dict[Any, int] = {}
        prompts = zip(said, *map(content_keys, images), strict=True)
        kind = np.array([known.setdefault(prompt, len(known)) for prompt in prompts])
        first = torch.from_numpy(np.unique(kind, return_index=True)[1]).to(images[0].device)
        return self.vlm.read([camera[first] for camera in images], [text for text, *_ in known]), kind

    def features(self, observation: Tree) -> Tensor:
        """What values are read from [B, H]: the last hidden state of the prompt, standardised per row."""
        return standardized(self.vlm.states(self.context(observation))[:, -1])

    def make_encoder(self, *, rng: torch.Generator) -> FrozenFeatures:
        """What a value reads: the trunk's features, without gradient into it."""
        return FrozenFeatures(self, self.vlm.hidden_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (adapters merged into it), tokenizer and image processor: `model: folder` reads it."""
        self.vlm.save(Path(folder))
