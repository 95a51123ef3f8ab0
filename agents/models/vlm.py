"""Any Hugging Face image-text-to-text model as a trunk: images, an instruction and extra vectors to hidden states.

Boundary: loading, checking, embedding, running with or without a cache, choosing what is trained, saving. Knows no
action and no policy; transformers and peft are imported when a model is made.
Legend: N rows, P tokens of a prompt (images and extra vectors included), C further inputs, H hidden size.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft.agents.models.feature_cache import FeatureCache
from embodied_rft.agents.models.pretrained import check_tokenizer, checkpoint_layers, close, decoder_of, load_pretrained
from embodied_rft.agents.models.processing import Pixels, Prompts, layout_of
from embodied_rft.agents.models.tiny_vlm import TinyVLMConfig, tiny_vlm
from embodied_rft.names import UserError
from embodied_rft.networks.trainable import LoraOptions, Train, adapters_of, add_adapters, merged

APART = 2**30  # number of the block of inputs after a prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """What images of one size become: positions of their places from the first on, and where the text goes on."""

    places: np.ndarray  # [n], or [3, n] of time, height and width
    advance: int


@dataclass(frozen=True, slots=True)
class Context:
    """N prompts as the decoder reads them; all end at their last place, padding is on the left."""

    embeddings: Tensor  # [N, P, H]
    mask: Tensor  # [N, P] bool
    position: Tensor  # [N, P], or [3, N, P] for models with three-dimensional positions
    next_position: Tensor  # [N], of what follows
    blocks: Tensor | None = None  # [N, P] int64: equal numbers see each other both ways; -1 sees what was before
    visual: Tensor | None = None  # [N, P] bool, places of images; None: only the first layer reads them
    deep: tuple[Tensor, ...] = ()  # [images' places of all rows, H] each: what further layers add there (Qwen3-VL)


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
        trunk, config = model.base_model, model.config
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        needed = (getattr(trunk, "get_image_features", None), getattr(config, "image_token_id", None))
        if None in needed or not hasattr(config, "vision_config") or config.is_encoder_decoder:
            raise UserError(
                f"{type(model).__name__} does not read images as tokens of a decoder (no get_image_features, image "
                "token or vision_config, or an encoder of text): a vision-language model like Qwen-VL, LLaVA, "
                "PaliGemma, Gemma 3, InternVL or SmolVLM is expected; see docs/text.md"
            )
        self.config = config.get_text_config()
        self.hidden_size: int = self.config.hidden_size
        check_tokenizer(model, tokenizer, ends=False)
        self.layout = layout_of(config, tokenizer)
        self.prompts = Prompts(tokenizer, image_token=model.config.image_token_id, layout=self.layout, template=prompt)
        known = inspect.signature(trunk.get_image_features).parameters
        pixtral = getattr(config.vision_config, "model_type", "") == "pixtral"  # LLaVA takes sizes for this tower only
        names = [n for n, p in known.items() if n != "image_sizes" or p.default is p.empty or pixtral]
        self.pixels = Pixels(model.config, names=names, processor=processor)
        self.cache = FeatureCache(cache_bytes)
        self.checkpointing = False
        self.vision_frozen = False  # by `select`: what decides whether features of images may be kept
        self._grids: dict[tuple[int, ...], np.ndarray] = {}  # patches of an image by its shape
        self._shapes: dict[tuple[int, ...], Shape] = {}  # likewise
        self._compared = False  # with the model's own forward pass

    def _load_from_state_dict(self, *args: Any) -> None:
        self.cache.clear()
        super()._load_from_state_dict(*args)

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return decoder_of(self.model)

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
        if train.startswith("lora") and not adapters_of(self):
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
        checkpoint_layers(self.model)
        self.checkpointing = True

    def _image_parameters(self) -> list[nn.Parameter]:
        """The way from pixels to image features: all of the trunk but the decoder."""
        own = {id(p) for p in self.decoder.parameters()}
        return [p for p in self.model.base_model.parameters() if id(p) not in own]

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, images: Sequence[Tensor], instructions: Sequence[str], extra: Tensor | None = None) -> Context:
        """Images of each camera [N, H, W, 3] uint8, N instructions and further vectors [N, E, H] after them."""
        context = self._read(images, instructions)
        self.check_length(context, 0 if extra is None else extra.shape[1])
        if not self._compared:
            self._compare(images[0][:1], instructions[0])
            self._compared = True
        if self.layout.blocks is not None:
            context = replace(context, blocks=self._blocks(context))
        if extra is None:
            return context
        count, mask, position = extra.shape[1], context.mask, context.position
        following = context.next_position
        inside, no_image = context.blocks, mask.new_zeros(len(mask), count)
        if inside is not None:
            inside = torch.cat(
                [inside, inside.new_full((len(mask), count), 0 if self.layout.blocks == "prompt" else -1)], 1
            )
        return replace(
            context,
            embeddings=torch.cat([context.embeddings, extra.to(context.embeddings.dtype)], 1),
            mask=torch.cat([mask, mask.new_ones(len(mask), count)], 1),
            position=torch.cat([position, _after(position, following, count)], -1),
            next_position=following + count,
            blocks=inside,
            visual=None if context.visual is None else torch.cat([context.visual, no_image], 1),
        )

    def check_length(self, context: Context, count: int) -> None:
        """Refuse prompts whose positions, with `count` further ones, go beyond those that the model knows."""
        most, longest = getattr(self.config, "max_position_embeddings", None), int(context.next_position.max())
        if most is not None and longest + count > most:
            raise UserError(
                f"a prompt with images of {longest} positions and {count} more exceed the model's context of {most}: "
                "shorten the text, give fewer or smaller images, or ask for less"
            )

    def _read(self, images: Sequence[Tensor], instructions: Sequence[str]) -> Context:
        trunk, device = self.model.base_model, images[0].device
        if len({len(camera) for camera in images}) > 1:
            raise UserError(f"cameras have {[len(c) for c in images]} images: one of each camera a row is expected")
        seen = [self._features(camera) for camera in images]
        features = torch.cat([f for f, _ in seen], 1)
        ids_, mask_ = self.prompts.encode(instructions, [f.shape[1] for f, _ in seen])
        ids, mask = torch.from_numpy(ids_).to(device), torch.from_numpy(mask_).to(device)
        places = ids == self.prompts.image_token
        wanted = int((ids_ == self.prompts.image_token).sum())
        if wanted != features.shape[0] * features.shape[1]:
            raise UserError(
                f"{len(instructions)} prompts have {wanted} image tokens, {len(features)} rows of images have "
                f"{features.shape[0] * features.shape[1]} features: one image of each camera a prompt is expected"
            )
        embeddings = trunk.get_input_embeddings()(ids.masked_fill(places, 0))
        if features.shape[-1] % embeddings.shape[-1]:
            raise UserError(
                f"{type(self.model).__name__} is refused: its images have size {features.shape[-1]}, its tokens "
                f"{embeddings.shape[-1]}. See docs/text.md for families that are known"
            )
        first, *deep = features.flatten(0, 1).split(embeddings.shape[-1], -1)
        embeddings = embeddings.masked_scatter(places[..., None], first.to(embeddings.dtype))
        position = self._positions(ids_, mask_, [g for _, g in seen], device)
        following = position.amax((0, 2) if position.dim() == 3 else 1) + 1
        return Context(embeddings, mask, position, following, visual=places, deep=tuple(deep))

    def _blocks(self, context: Context) -> Tensor:
        """[N, P]: the prompt is one block, or each run of image tokens is."""
        visual = context.visual
        assert visual is not None
        if self.layout.blocks == "prompt":
            return torch.zeros_like(visual, dtype=torch.int64)
        begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        return torch.where(visual, begins.cumsum(1) - 1, -1)

    def features(self, images: Tensor) -> Tensor:
        """[N, n, H] of N images of one size; what is added in further layers comes behind, [N, n, H * (1 + layers)].

        The first image that is ever read is read by the model itself, too (see `_compare`).
        """
        if not self._compared:
            self._compare(images[:1], "?")
            self._compared = True
        return self._features(images)[0]

    @property
    def three(self) -> bool:
        """Whether positions have three dimensions: time, height and width."""
        return self.pixels.patches and hasattr(self.model.base_model, "get_rope_index")

    def shape_of(self, size: tuple[int, ...]) -> Shape:
        """What images of this size become in a row of tokens."""
        if size not in self._shapes:
            with torch.no_grad():
                blank = torch.zeros((1, *size), dtype=torch.uint8, device=self.model.device)
                count = self.features(blank).shape[1]
            if not self.three:
                self._shapes[size] = Shape(np.arange(count), count)
            else:
                ids = np.append(np.full(count, self.prompts.image_token), 0)[None]  # and the text behind it
                found = self._positions(ids, np.ones_like(ids, bool), [self._grids[size]], torch.device("cpu"))
                places = found[:, 0].numpy() - found.min().item()
                self._shapes[size] = Shape(places[:, :-1], int(places[0, -1]))
        return self._shapes[size]

    def _features(self, images: Tensor) -> tuple[Tensor, np.ndarray | None]:
        """Features [N, n, H] of one camera's images and, for models that ask for it, the grid [3] of their patches.

        What a model adds in further layers comes behind, [N, n, H * (1 + layers)].
        """
        trunk, shape = self.model.base_model, tuple(images.shape[1:])

        def compute(chosen: Tensor) -> Tensor:
            given = self.pixels(chosen)
            if self.pixels.patches:
                self._grids[shape] = given["image_grid_thw"][0].cpu().numpy()
            try:
                made = trunk.get_image_features(**given)
                first = getattr(made, "pooler_output", None)
                first = getattr(made, "last_hidden_state", made) if first is None else first
                parts = [first, *(getattr(made, "deepstack_features", None) or ())]
                return torch.cat([_of_each(part, len(chosen)) for part in parts], -1)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{type(self.model).__name__} cannot read images of shape {shape} ({error}): give it images of "
                    "another size, and the image processor that was saved with it"
                ) from error

        features = self.cache(images, compute) if self.vision_frozen else compute(images)
        return features, self._grids.get(shape)

    @torch.no_grad()
    def _compare(self, image: Tensor, instruction: str) -> None:
        """The first prompt that is read is read by the model itself, too; what it computes otherwise is refused."""
        trunk, name = self.model.base_model, type(self.model).__name__
        with torch.autocast(image.device.type, enabled=False):
            context = self._read([image], [instruction])
            if self.layout.blocks is not None:
                context = replace(context, blocks=self._blocks(context))
            own = self.states(context)
            assert context.visual is not None  # there is an image
            tokens = int(context.visual.sum())
            ids, mask = (torch.from_numpy(a).to(image.device) for a in self.prompts.encode([instruction], [tokens]))
            kinds = context.visual.long()
            given = {
                "token_type_ids": 0 * kinds if self.layout.blocks == "prompt" else kinds,
                "mm_token_type_ids": kinds,
            }
            known = inspect.signature(trunk.forward).parameters
            given = {key: value for key, value in given.items() if key in known} | self.pixels(image)
            try:
                theirs = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False, **given).last_hidden_state
            except Exception as error:  # a model of another kind fails in its own ways
                raise UserError(f"{name} is refused: it does not read an image and a text ({error})") from error
        if own.shape != theirs.shape or not close(own, theirs):
            raise UserError(
                f"{name} is refused: it reads an image and a text in a way that is not known here, so its actions and "
                "probabilities would be wrong. See docs/text.md for families that are known"
            )

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
        mask, blocks = context.mask, context.blocks
        if count:
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
            if blocks is not None or bidirectional:
                before = torch.full_like(context.mask, -1, dtype=torch.int64) if blocks is None else blocks
                blocks = torch.cat([before, before.new_full((len(mask), count), APART if bidirectional else -1)], 1)
        return self._run(embeddings, position, mask, None, blocks=blocks, context=context)

    def start(self, context: Context) -> tuple[Tensor, Decoding]:
        """Last hidden states [N, P, H] of the prompts, and the means to go on one input at a time; no gradient."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.decoder.config)
        hidden = self._run(
            context.embeddings, context.position, context.mask, cache, blocks=context.blocks, context=context
        )
        return hidden, Decoding(self, cache, context)

    def _run(
        self,
        embeddings: Tensor,
        position: Tensor,
        mask: Tensor,
        cache: Any,
        *,
        blocks: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Last hidden states [N, C, H] of inputs [N, C, H].

        Args:
            embeddings: the inputs.
            position: of the inputs.
            mask: [N, past + C] bool, False at padding.
            cache: keys and values of the past.
            blocks: [N, C], as in `Context`; only without a past.
            context: of the prompts at the beginning of the inputs.
        """
        decoder = self.decoder
        if self.checkpointing:  # Hugging Face checkpoints only in training mode; all dropout is off
            decoder.train(cache is None and torch.is_grad_enabled())
        deep: dict[str, Any] = {}
        if context is not None and context.deep and context.visual is not None:
            further = mask.shape[1] - context.visual.shape[1]
            places = torch.nn.functional.pad(context.visual, (0, further))
            deep = {"visual_pos_masks": places, "deepstack_visual_embeds": list(context.deep)}
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask if blocks is None else look_both_ways(decoder, embeddings, mask, blocks),
            position_ids=position,
            past_key_values=cache,
            use_cache=cache is not None,
            **deep,
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
        return self.vlm._run(embedding[:, None].to(self.dtype), position, self.mask, self.cache)[:, 0]


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
    if isinstance(source, dict):
        if list(source) != ["tiny"]:
            raise UserError(f'model is {source!r}; expected a folder, a hub id, or {{"tiny": {{...}}}}')
        model, tokenizer = tiny_vlm(source["tiny"], rng=rng)
        number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        return VLM(model.to(number), tokenizer, prompt=prompt, cache_bytes=cache_bytes)
    from transformers import AutoImageProcessor

    kinds = ("AutoModelForImageTextToText",)
    source, model, tokenizer = load_pretrained(source, kinds, what="vision-language model", dtype=dtype)
    try:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except Exception as error:  # whatever a library says about a file that it cannot read
        if (Path(source) / "preprocessor_config.json").exists():
            raise UserError(
                f"the image processor of {source!r} cannot be loaded ({' '.join(str(error).split())[:300]}): images "
                "would be scaled in another way than in its training. Mend or replace preprocessor_config.json."
            ) from error
        processor = None  # it was saved without one: ours
    return VLM(model, tokenizer, processor=processor, prompt=prompt, cache_bytes=cache_bytes)


def _after(position: Tensor, following: Tensor, count: int) -> Tensor:
    """Positions of `count` inputs after the prompts, in the form of `position`."""
    further = following[:, None] + torch.arange(count, device=following.device)
    return further.expand(3, *further.shape) if position.dim() == 3 else further


def _of_each(made: Any, count: int) -> Tensor:
    """[M, n, H] from features of M images of one size, in whichever form a model gives them."""
    made = made if isinstance(made, Tensor) else torch.cat([part.flatten(0, -2) for part in made])
    return made.reshape(count, -1, made.shape[-1])


def look_both_ways(decoder: Any, embeddings: Tensor, mask: Tensor, blocks: Tensor) -> Any:
    """Masks as the decoder makes them itself (sliding windows included), where blocks see themselves both ways."""
    from transformers.masking_utils import create_masks_for_generate

    made = create_masks_for_generate(decoder.config, embeddings, mask, None, block_sequence_ids=blocks)
    if made is mask:
        raise UserError(f"{type(decoder).__name__} cannot look ahead: with head parallel, choose attention: causal")
    return next(iter(made.values())) if isinstance(made, dict) and len(made) == 1 else made
