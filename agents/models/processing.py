"""What a vision-language model is given: camera images as pixel tensors, instructions as token ids with image places.

Boundary: uint8 images and texts in, tensors and ids out; knows processors and tokenizers, no weights and no policy.
Legend: M images of one camera, N rows, P tokens of a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embodied_rft.names import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_FAMILIES = {"qwen2_vl", "qwen2_5_vl", "glm4v", "clip_vision_model", "pixtral"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family of models wants its prompt, e.g. Layout(before="<|vision_start|>", after="<|vision_end|>")."""

    before: str = ""  # of every image
    after: str = ""
    margin: str = ""  # of text, around all that
    prompt: str = "{images}{instruction}\n"
    first_position: int = 0  # of the first token
    blocks: Literal["prompt", "images"] | None = None  # what sees itself in both directions; None: nothing does


QWEN = Layout(
    before="<|vision_start|>",
    after="<|vision_end|>",
    prompt="<|im_start|>user\n{images}What action should the robot take to {instruction}?<|im_end|>\n"
    "<|im_start|>assistant\n",
)
IDEFICS = Layout(
    before="<fake_token_around_image><global-img>",
    after="<fake_token_around_image>",
    prompt="<|im_start|>User:{images}What action should the robot take to {instruction}?<end_of_utterance>\nAssistant:",
)
LAYOUTS = {  # by model_type; of every other family see `layout_of`
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), QWEN),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "paligemma": Layout(prompt="{images}{bos}{instruction}\n", first_position=1, blocks="prompt"),
    "gemma3": Layout(margin="\n\n", blocks="images"),
}
AROUND = (  # names under which a configuration has the tokens before and after an image
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
    ("boi_token_index", "eoi_token_index"),
    ("boi_token_id", "eoi_token_id"),
)


def layout_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Layout:
    """What a model's family wants, with the tokens around an image that its configuration names."""
    layout = LAYOUTS.get(config.model_type, Layout())
    for names in AROUND:
        ids = [id for name in names if (id := getattr(config, name, None)) is not None]
        if len(ids) == len(names) and max(ids) < len(tokenizer):
            before, after = list(tokenizer.convert_ids_to_tokens(ids))
            if before is not None and after is not None:
                return replace(layout, before=before, after=after)
    return layout


class Places:
    """How pictures are written into a text: with the tokens that a family wants around each.

    Args:
        tokenizer: a fast tokenizer.
        image_token: id that stands for a picture.
        layout: of the model's family.

    Raises:
        ValueError: the tokenizer does not know the image token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, image_token: int, layout: Layout) -> None:
        self.id, self.layout = image_token, layout
        text = tokenizer.convert_ids_to_tokens(image_token)
        if text is None or tokenizer(text, add_special_tokens=False)["input_ids"] != [image_token]:
            raise UserError(
                f"the model's image token {image_token} is no special token of the tokenizer ({text!r}): they do not "
                "belong together. Load the tokenizer that was saved with the model."
            )
        self.token = str(text)

    def before_text(self, pictures: int) -> str:
        """So many pictures."""
        return self._whole * pictures

    @property
    def _whole(self) -> str:
        layout = self.layout
        return layout.margin + layout.before + self.token + layout.after + layout.margin

    def around(self, text: str) -> str:
        """What a chat template wrote: its places of pictures get what it left out around them."""
        before, after = self.layout.before, self.layout.after
        if before and self.token not in text:  # Gemma writes the begin of a picture alone
            return text.replace(before, self._whole)
        first, *others = text.split(self.token)
        for other in others:
            first = first.removesuffix(before) + self._whole + other.removeprefix(after)
        return first


class Prompts:
    """Instructions to token ids with as many image tokens as there are image features.

    Args:
        tokenizer: a fast tokenizer.
        image_token: id that stands for a piece of an image.
        layout: of the model's family.
        template: a prompt with {images} and {instruction}, {bos} for the begin token; None: the family's.

    Raises:
        ValueError: the tokenizer does not know the image token, or the template has no place for the images.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, image_token: int, layout: Layout, template: str | None = None
    ) -> None:
        self.tokenizer, self.image_token, self.layout = tokenizer, image_token, layout
        self.places = Places(tokenizer, image_token=image_token, layout=layout)
        self.template = layout.prompt if template is None else template
        for part in ("{images}", "{instruction}"):
            if self.template.count(part) != 1:
                raise UserError(f"prompt {self.template!r} must hold {part} exactly once")
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_one)

    def encode(self, instructions: Sequence[str], tokens_per_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [N, P] int64, mask [N, P] bool), padded on the left, so that what follows a prompt follows directly.

        Args:
            instructions: N texts.
            tokens_per_image: number of features of each of a row's images.

        Raises:
            ValueError: a prompt has another number of image places than there are images.
        """
        rows = [self._encode(text, tuple(tokens_per_image)) for text in instructions]
        width = max(map(len, rows))
        ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.bool_)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :], mask[index, width - len(row) :] = row, True
        return ids, mask

    def _encode_one(self, instruction: str, tokens_per_image: tuple[int, ...]) -> np.ndarray:
        text = self.template.replace("{bos}", self.tokenizer.bos_token or "")
        images = self.places.before_text(len(tokens_per_image))
        text = text.replace("{images}", images).replace("{instruction}", instruction)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        places = ids == self.image_token
        if places.sum() != len(tokens_per_image):
            raise UserError(
                f"the prompt for {instruction!r:.80} has {places.sum()} places for images, the observation has "
                f"{len(tokens_per_image)} images: take {self.places.token!r} out of the instruction and the prompt"
            )
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = tokens_per_image
        return ids.repeat(repeats)


class Pixels:
    """Images of one camera [M, H, W, 3] uint8 to what `get_image_features` of a model takes.

    With the model's own image processor where there is one; else by our own: resize (bilinear, antialiased), scale to
    [0, 1], normalise, and lay out as the model's vision tower expects.

    Args:
        config: of the model.
        names: parameters that its `get_image_features` knows.
        processor: the model's own image processor, or None.

    Raises:
        ValueError: there is no image processor, and the model wants its images in a way that ours does not know.
    """

    def __init__(self, config: Any, *, names: Sequence[str], processor: Any = None) -> None:
        vision = config.vision_config
        self.names, self.patches, self.tiles = names, "image_grid_thw" in names, "pixel_attention_mask" in names
        self.patch, self.merge = _side(vision.patch_size), getattr(vision, "spatial_merge_size", 1)
        self.frames = getattr(vision, "temporal_patch_size", 1)
        size = None if self.patches else getattr(vision, "image_size", None)
        self.size = None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])
        clip = {config.model_type, getattr(vision, "model_type", "")} & CLIP_FAMILIES
        self.mean, self.std = (CLIP_MEAN, CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
        self.processor = processor
        for option in ("do_image_splitting", "crop_to_patches", "do_pan_and_scan"):
            if hasattr(processor, option):
                setattr(processor, option, False)  # one view of a camera, not a mosaic
        foreign = {"image_sizes", "spatial_shapes"} & set(names)
        if processor is None and foreign and getattr(vision, "model_type", "") != "pixtral":
            raise UserError(
                f"a {config.model_type} model needs its own image processor (it wants {', '.join(sorted(foreign))}): "
                "save it into the model's folder, processor.save_pretrained(folder)"
            )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Keyword arguments for `get_image_features`, on the device of the images."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
            given = f"images of shape {tuple(images.shape)} and {images.dtype}"
            raise UserError(f"{given}; [M, H, W, 3] uint8 is expected")
        if self.processor is not None:
            return self._by_processor(images)
        x = images.permute(0, 3, 1, 2).float()
        height, width = self._target(*x.shape[-2:])
        if (height, width) != x.shape[-2:]:
            x = F.interpolate(x, (height, width), mode="bilinear", antialias=True).round_().clamp_(0, 255)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        x = x.div_(255).sub_(mean).div_(std)  # `float` has made a copy
        if self.patches:
            return self._patchify(x)
        if self.tiles:
            mask = torch.ones(len(x), 1, height, width, dtype=torch.bool, device=x.device)
            return {"pixel_values": x[:, None], "pixel_attention_mask": mask}
        if "image_sizes" in self.names:
            return {
                "pixel_values": x,
                "image_sizes": torch.tensor([[height, width]], device=x.device).expand(len(x), 2),
            }
        return {"pixel_values": x}

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        unit = self.patch * self.merge
        return max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)

    def _patchify(self, x: Tensor) -> dict[str, Tensor]:
        """Qwen-VL's order: blocks of merged patches, then patches inside them; a still image fills all frames."""
        count, channels, height, width = x.shape
        p, m, rows, columns = self.patch, self.merge, height // self.patch, width // self.patch
        x = x.reshape(count, channels, rows // m, m, p, columns // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.unsqueeze(6).expand(*x.shape[:6], self.frames, *x.shape[6:])
        flat = x.reshape(count * rows * columns, channels * self.frames * p * p)
        grid = torch.tensor([[1, rows, columns]], device=x.device).expand(count, 3)
        return {"pixel_values": flat, "image_grid_thw": grid}

    def _by_processor(self, images: Tensor) -> dict[str, Tensor]:
        arrays: list[Any] = list(images.cpu().numpy())
        given: Any = [[array] for array in arrays] if self.tiles else arrays
        made = self.processor(images=given, return_tensors="pt", input_data_format="channels_last")
        if "pixel_values" not in made:
            raise UserError(
                f"the image processor makes {', '.join(made)}, but no pixel_values: a processor is expected"
            )
        size = tuple(made["pixel_values"].shape[-1 if self.patches else -2 :])
        expected = (3 * self.frames * self.patch**2,) if self.patches else self.size
        if size != expected and not {"image_sizes", "spatial_shapes", "pixel_attention_mask"} & set(self.names):
            raise UserError(
                f"the image processor makes {'patches' if self.patches else 'images'} of size {size}, the "
                f"vision tower reads {expected}: load the processor that was saved with the model"
            )
        return {name: torch.as_tensor(made[name]).to(images.device) for name in self.names if name in made}


def _side(size: Any) -> int:
    """Of a square that some configurations write as a number and others as two."""
    return int(size if isinstance(size, int) else size[0])
