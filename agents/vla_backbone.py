"""Any Hugging Face image-text-to-text model as a trunk: images, an instruction and extra vectors to hidden states.

Boundary: loading, checking, embedding, running with or without a cache, choosing what is trained, saving. Knows no
action and no policy; transformers and peft are imported when a model is made.
Legend: N rows, P tokens of a prompt (images and extra vectors included), C further inputs, H hidden size.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft.agents.tiny_vlm import TinyVLMConfig, tiny_vlm
from embodied_rft.agents.vla_processing import LAYOUTS, Layout, Pixels, Prompts
from embodied_rft.tuning import LoraOptions, Train, add_adapters, is_adapted, merged


@dataclass(frozen=True, slots=True)
class Context:
    """N prompts as the decoder reads them; all end at their last place, padding is on the left."""

    embeddings: Tensor  # [N, P, H]
    mask: Tensor  # [N, P] bool
    position: Tensor  # [N, P], or [3, N, P] for models with three-dimensional positions
    next_position: Tensor  # [N], of what follows


class VLM(nn.Module):
    """A vision-language model, its tokenizer and its image processing.

    Args:
        model: a Hugging Face `...ForConditionalGeneration` with `get_image_features`.
        tokenizer: a fast tokenizer.
        processor: the model's own image processor; None: ours.
        prompt: a template (see `Prompts`); None: that of the model's family.
        cache_bytes: most memory for features of images, which are kept while their tower is frozen.

    Raises:
        ValueError: the model is of no known form, or the tokenizer does not belong to it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, processor: Any = None, prompt: str | None = None, cache_bytes: int = 2**28
    ) -> None:
        super().__init__()
        trunk = model.base_model
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        if not hasattr(trunk, "get_image_features") or getattr(model.config, "image_token_id", None) is None:
            raise ValueError(
                f"{type(model).__name__} has no get_image_features or no image token: a vision-language model with "
                "images as tokens is expected"
            )
        self.config = model.config.get_text_config()
        self.hidden_size: int = self.config.hidden_size
        self.layout = LAYOUTS.get(model.config.model_type, Layout())
        _check_tokenizer(model, tokenizer)
        self.prompts = Prompts(tokenizer, image_token=model.config.image_token_id, layout=self.layout, template=prompt)
        names = list(inspect.signature(trunk.get_image_features).parameters)
        self.pixels = Pixels(model.config, names=names, processor=processor)
        self.cache = FeatureCache(cache_bytes)
        self.checkpointing = False
        self.vision_frozen = False  # by `select`: what decides whether features of images may be kept
        self._grids: dict[tuple[int, ...], np.ndarray] = {}  # patches of an image by its shape

    def _load_from_state_dict(self, *args: Any) -> None:
        self.cache.clear()
        super()._load_from_state_dict(*args)

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.model.base_model.get_decoder()

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that tells models apart whose weights do not fit each other."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return {
            "model_type": self.model.config.model_type,
            "hidden_size": self.hidden_size,
            "num_layers": self.config.num_hidden_layers,
            "vocab_size": self.config.vocab_size,
            "tokenizer": hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16],
        }

    # --- what is trained -----------------------------------------------------------------------------------------

    def select(self, train: Train, *, freeze_vision: bool, lora: LoraOptions, rng: torch.Generator) -> None:
        """Freeze everything but what is to be trained; adapters are added to the decoder, `rng` draws their weights."""
        self.cache.clear()
        self.vision_frozen = train != "full" or freeze_vision
        if train.startswith("lora") and not is_adapted(self):
            add_adapters(self.decoder, lora, rng)
        self.requires_grad_(False)
        if train == "full":
            self.model.base_model.requires_grad_(True)  # an output layer of its own is not used
            for parameter in self._image_parameters() if freeze_vision else ():
                parameter.requires_grad_(False)
        elif train.startswith("lora"):
            for name, parameter in self.decoder.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def checkpoint_layers(self) -> None:
        """Compute each layer of the decoder twice instead of keeping its activations (Chen et al. 2016)."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.checkpointing = True

    def _image_parameters(self) -> list[nn.Parameter]:
        """The way from pixels to image features: all of the trunk but the decoder."""
        own = {id(p) for p in self.decoder.parameters()}
        return [p for p in self.model.base_model.parameters() if id(p) not in own]

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, images: Sequence[Tensor], instructions: Sequence[str], extra: Tensor | None = None) -> Context:
        """Images of each camera [N, H, W, 3] uint8, N instructions and further vectors [N, E, H] after them."""
        trunk, device = self.model.base_model, images[0].device
        seen = [self._features(camera) for camera in images]
        features = torch.cat([f for f, _ in seen], 1)
        ids_, mask_ = self.prompts.encode(instructions, [f.shape[1] for f, _ in seen])
        ids, mask = torch.from_numpy(ids_).to(device), torch.from_numpy(mask_).to(device)
        places = ids == self.prompts.image_token
        wanted = int((ids_ == self.prompts.image_token).sum())
        if wanted != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"{len(instructions)} prompts have {wanted} image tokens, {len(features)} rows of images have "
                f"{features.shape[0] * features.shape[1]} features: one image of each camera a prompt is expected"
            )
        embeddings = trunk.get_input_embeddings()(ids.masked_fill(places, 0))
        embeddings = embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))
        position = self._positions(ids_, mask_, [g for _, g in seen], device)
        following = position.amax((0, 2) if position.dim() == 3 else 1) + 1
        if extra is not None:
            count = extra.shape[1]
            embeddings = torch.cat([embeddings, extra.to(embeddings.dtype)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
            position, following = torch.cat([position, _after(position, following, count)], -1), following + count
        return Context(embeddings, mask, position, following)

    def _features(self, images: Tensor) -> tuple[Tensor, np.ndarray | None]:
        """Features [N, n, H] of one camera's images and, for models that ask for it, the grid [3] of their patches."""
        trunk, shape = self.model.base_model, tuple(images.shape[1:])

        def compute(chosen: Tensor) -> Tensor:
            given = self.pixels(chosen)
            if self.pixels.patches:
                self._grids[shape] = given["image_grid_thw"][0].cpu().numpy()
            made = trunk.get_image_features(**given)
            made = getattr(made, "pooler_output", made)
            made = made if isinstance(made, Tensor) else torch.stack(list(made))
            return made.reshape(len(chosen), -1, made.shape[-1])

        features = self.cache(images, compute) if self.vision_frozen else compute(images)
        return features, self._grids.get(shape)

    def _positions(
        self, ids: np.ndarray, mask: np.ndarray, grids: list[np.ndarray | None], device: torch.device
    ) -> Tensor:
        """Positions [N, P] or [3, N, P]; rows of equal layout are computed once."""
        trunk = self.model.base_model
        if not hasattr(trunk, "get_rope_index") or grids[0] is None:
            position = mask.cumsum(1) - 1 + self.layout.first_position
            return torch.from_numpy(np.where(mask, position, 0)).to(device)
        kinds = (ids == self.prompts.image_token).astype(np.int64)
        _, first, inverse = np.unique(np.where(mask, kinds, 2), axis=0, return_index=True, return_inverse=True)
        position, _ = trunk.get_rope_index(
            torch.from_numpy(ids[first]),
            mm_token_type_ids=torch.from_numpy(kinds[first]),
            image_grid_thw=torch.from_numpy(np.stack([g for g in grids if g is not None] * len(first))),
            attention_mask=torch.from_numpy(mask[first].astype(np.int64)),
        )
        return position[:, torch.from_numpy(inverse.reshape(-1))].to(device)

    # --- running -------------------------------------------------------------------------------------------------

    def states(self, context: Context, further: Tensor | None = None, *, bidirectional: bool = False) -> Tensor:
        """Last hidden states [N, P + C, H] of prompts and further inputs [N, C, H] in one pass.

        Args:
            context: N prompts.
            further: inputs after them.
            bidirectional: whether further inputs see each other in both directions.
        """
        count = 0 if further is None else further.shape[1]
        embeddings, position = context.embeddings, context.position
        if further is not None:
            embeddings = torch.cat([embeddings, further.to(embeddings.dtype)], 1)
            position = torch.cat([position, _after(position, context.next_position, count)], -1)
        allowed = self._allowed(context.mask, count, bidirectional)
        return self._run(embeddings, position, allowed, None)

    def start(self, context: Context) -> tuple[Tensor, Decoding]:
        """Last hidden states [N, P, H] of the prompts, and the means to go on one input at a time; no gradient."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        hidden = self._run(context.embeddings, context.position, self._allowed(context.mask, 0, False), cache)
        return hidden, Decoding(self, cache, context)

    def _allowed(self, mask: Tensor, count: int, bidirectional: bool) -> Tensor:
        """[N, 1, P + C, P + C] bool: who sees whom."""
        prompt, total = mask.shape[1], mask.shape[1] + count
        place = torch.arange(total, device=mask.device)
        allowed = place[:, None] >= place[None, :]
        inside = place < prompt
        if self.layout.bidirectional:
            allowed = allowed | (inside[:, None] & inside[None, :])
        if bidirectional:
            allowed = allowed | ~(inside[:, None] | inside[None, :])
        visible = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
        # Padding sees itself, so that no row of the softmax is empty.
        return ((allowed & visible[:, None, :]) | torch.eye(total, dtype=torch.bool, device=mask.device))[:, None]

    def _run(self, embeddings: Tensor, position: Tensor, allowed: Tensor, cache: Any) -> Tensor:
        decoder = self.decoder
        if self.checkpointing:  # Hugging Face checkpoints only in training mode; all dropout is off
            decoder.train(cache is None and torch.is_grad_enabled())
        lowest = torch.finfo(embeddings.dtype).min
        mask = torch.zeros(allowed.shape, dtype=embeddings.dtype, device=allowed.device).masked_fill(~allowed, lowest)
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and image processor, adapters merged into the weights."""
        merged(self.model).save_pretrained(folder)
        for part in (self.tokenizer, self.processor):
            if part is not None:
                part.save_pretrained(folder)


class Decoding:
    """A started row of inputs: keys and values so far."""

    def __init__(self, vlm: VLM, cache: Any, context: Context) -> None:
        self.vlm, self.cache, self.mask, self.three = vlm, cache, context.mask, context.position.dim() == 3
        self.dtype = context.embeddings.dtype
        self.next_position = context.next_position

    def step(self, embedding: Tensor) -> Tensor:
        """The hidden state [N, H] of one more input [N, H]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        position = self.next_position[:, None]
        position = position.expand(3, *position.shape) if self.three else position
        self.next_position = self.next_position + 1
        return self.vlm._run(embedding[:, None].to(self.dtype), position, self.mask[:, None, None, :], self.cache)[:, 0]


class FeatureCache:
    """Features of images by a hash of their content, least recently used first out.

    Args:
        limit: bytes; what one batch needs is kept while it is used, whatever the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.computed = limit, 0, 0
        self._kept: OrderedDict[tuple[bytes, bool], Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._kept.clear()
        self.used = 0

    @torch.no_grad()
    def __call__(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(images)` [N, ...], each distinct image once."""
        arrays = images.cpu().numpy()
        low = torch.is_autocast_enabled(images.device.type)  # features of another precision are others
        shape = repr(arrays.shape[1:]).encode()
        keys = [(hashlib.blake2b(shape + a.tobytes(), digest_size=16).digest(), low) for a in arrays]
        have = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: index for index, key in enumerate(keys) if key not in have}
        if missing:
            new = compute(images[torch.tensor(list(missing.values()), device=images.device)])
            self.computed += len(missing)
            have |= {key: value.clone() for key, value in zip(missing, new, strict=True)}
        for key in have:
            self._keep(key, have[key])
        return torch.stack([have[key] for key in keys])

    def _keep(self, key: tuple[bytes, bool], value: Tensor) -> None:
        if key not in self._kept:
            self.used += value.nbytes
        self._kept[key] = value
        self._kept.move_to_end(key)
        while self.used > self.limit and self._kept:
            self.used -= self._kept.popitem(last=False)[1].nbytes


def load_vlm(
    source: str | dict[str, TinyVLMConfig],
    *,
    dtype: Literal["fp32", "bf16"],
    rng: torch.Generator,
    prompt: str | None,
    cache_bytes: int,
) -> VLM:
    """A model by folder or hub id, or {"tiny": {...}} with random weights.

    Raises:
        ValueError: nothing is there, it is no vision-language model, or model and tokenizer do not fit.
    """
    number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if isinstance(source, dict):
        if list(source) != ["tiny"]:
            raise ValueError(f'model is {source!r}; expected a folder, a hub id, or {{"tiny": {{...}}}}')
        model, tokenizer = tiny_vlm(source["tiny"], rng=rng)
        return VLM(model.to(number), tokenizer, prompt=prompt, cache_bytes=cache_bytes)
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    if source.startswith((".", "/", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise ValueError(f"model folder {source!r} does not exist; expected one that save_pretrained has written")
    try:
        config = AutoConfig.from_pretrained(source)
        _no_dropout(config)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=number)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model {source!r} cannot be loaded as a vision-language model: {reason}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, ImportError):
        processor = None  # it was saved without one: ours
    return VLM(model, tokenizer, processor=processor, prompt=prompt, cache_bytes=cache_bytes)


def _after(position: Tensor, following: Tensor, count: int) -> Tensor:
    """Positions of `count` inputs after the prompts, in the form of `position`."""
    further = following[:, None] + torch.arange(count, device=following.device)
    return further.expand(3, *further.shape) if position.dim() == 3 else further


def _no_dropout(config: Any) -> None:
    """A decision that is scored again must get the same probability."""
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for name, value in vars(part).items() if part is not None else ():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    used = {i for i in tokenizer.get_vocab().values() if i != model.config.image_token_id}
    if max(used) >= rows:
        raise ValueError(
            f"the tokenizer has token ids up to {max(used)}, the model knows {rows} tokens: they do not belong "
            "together. Load the tokenizer that was saved with the model."
        )
    eos, own = getattr(model.config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id
    known = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    if known and own is not None and own not in known:
        raise ValueError(
            f"the tokenizer ends a text with token {own} ({tokenizer.eos_token!r}), the model with {sorted(known)}: "
            "they do not belong together. Load the tokenizer that was saved with the model."
        )
