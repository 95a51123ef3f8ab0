"""Tiny random vision-language models of three families: the code path of real checkpoints without a download.

Boundary: makes Hugging Face objects; knows no policy. transformers is imported when a model is made.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass

from embodied_rft.agents.models.tiny_lm import tiny_tokenizer
from embodied_rft.names import UserError
from embodied_rft.options import STRICT, refuse_idle

IMAGE, VISION_START, VISION_END = "<image>", "<|vision_start|>", "<|vision_end|>"
AROUND, GLOBAL = "<fake_token_around_image>", "<global-img>"


@dataclass(config=STRICT, kw_only=True)
class TinyVLMConfig:
    """Size of a random vision-language model."""

    kind: Literal["qwen2_5_vl", "smolvlm", "paligemma"] = "qwen2_5_vl"  # family
    hidden_size: int = 64  # width
    num_layers: int = 2  # depth
    num_heads: int = 4  # of attention
    num_kv_heads: int = 2  # of attention, shared
    image_size: int = 32  # pixels; qwen2_5_vl takes images of any size
    patch_size: int = 8  # pixels; qwen2_5_vl and smolvlm merge 2x2 patches into one token
    vision_size: int = 32  # width of the vision tower
    vision_layers: int = 1  # depth of the tower
    vocab_size: int | None = None  # rows of the embedding; None: as many as the tokenizer knows

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if self.kind == "qwen2_5_vl":
            refuse_idle(self, ["image_size"], "with kind 'qwen2_5_vl', which takes images of any size")


def tiny_vlm(config: TinyVLMConfig | None = None, *, rng: torch.Generator) -> tuple[Any, Any]:
    """(model, tokenizer): a random `...ForConditionalGeneration`, float32, on the CPU, and a byte-level tokenizer.

    Args:
        config: its size.
        rng: draws the weights.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's, or sizes that do not divide.
    """
    config = config or TinyVLMConfig()
    if config.hidden_size % (2 * config.num_heads):
        raise UserError(f"hidden_size {config.hidden_size} must be a multiple of twice num_heads {config.num_heads}")
    from transformers import AutoModelForImageTextToText

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, VISION_START, VISION_END, AROUND, GLOBAL]})
    if config.vocab_size is not None and config.vocab_size < len(tokenizer):
        raise UserError(f"vocab_size is {config.vocab_size}: smaller than the tokenizer's {len(tokenizer)} tokens")
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
        model = AutoModelForImageTextToText.from_config(_hf_config(config, tokenizer), dtype=torch.float32)
        _widen(model)
    return model, tokenizer


@torch.no_grad()
def _widen(model: Any) -> None:
    """Standard deviation 1 / sqrt(inputs): the usual 0.02 is meant for wide layers, and these hardly learn with it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            module.weight.normal_(0, 1)


def _hf_config(c: TinyVLMConfig, tokenizer: Any) -> Any:
    from transformers import PaliGemmaConfig, Qwen2_5_VLConfig, SmolVLMConfig

    image, start, end = tokenizer.convert_tokens_to_ids([IMAGE, VISION_START, VISION_END])
    text: dict[str, Any] = {
        "vocab_size": c.vocab_size or len(tokenizer),
        "hidden_size": c.hidden_size,
        "intermediate_size": 3 * c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision: dict[str, Any] = {
        "hidden_size": c.vision_size,
        "intermediate_size": 2 * c.vision_size,
        "patch_size": c.patch_size,
    }
    layers = {"num_hidden_layers": c.vision_layers, "num_attention_heads": 2, "image_size": c.image_size}
    towers = {"model_type": "siglip_vision_model", "projection_dim": c.hidden_size, "vision_use_head": False}
    if c.kind == "smolvlm":
        return SmolVLMConfig(
            text_config={"model_type": "llama", **text},
            vision_config={**vision, **layers},
            scale_factor=2,
            image_token_id=image,
            tie_word_embeddings=False,
        )
    if c.kind == "paligemma":
        head = {"head_dim": c.hidden_size // c.num_heads}
        return PaliGemmaConfig(
            text_config={"model_type": "gemma", **text, **head},
            vision_config={**towers, **vision, **layers},
            image_token_index=image,
            projection_dim=c.hidden_size,
            hidden_size=c.hidden_size,
        )
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": _rope(c)},
        vision_config={
            **vision,
            "depth": c.vision_layers,
            "num_heads": 2,
            "out_hidden_size": c.hidden_size,
            "spatial_merge_size": 2,
            "window_size": 4 * c.patch_size,
            "fullatt_block_indexes": [c.vision_layers - 1],
        },
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )


def _rope(c: TinyVLMConfig) -> dict[str, Any]:
    """Positions in time, height and width share the frequencies of a head."""
    half, quarter = c.hidden_size // c.num_heads // 2, c.hidden_size // c.num_heads // 4
    sections = [half - 2 * quarter, quarter, quarter]
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
