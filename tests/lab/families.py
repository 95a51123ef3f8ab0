"""Tiny random models of many Hugging Face families, as folders: the sizes are ours, the traps are the family's own."""

import importlib

import torch

from embodied_rft.agents.models.tiny_lm import tiny_tokenizer
from embodied_rft.agents.models.tiny_vlm import AROUND, GLOBAL, IMAGE, VISION_END, VISION_START

TEXT = {
    "vocab_size": 290,  # larger than the tokenizer
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}  # shorter than the prompts
WIDE = {"head_dim": 16}  # not hidden_size / num_attention_heads
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
}
DECODERS = {  # model_type: what differs
    "llama": {**WIDE, "attention_bias": True, "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": WIDE,
    "mistral": WINDOW,
    "gemma": WIDE,
    "gemma2": {**WIDE, **WINDOW, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5},
    "gemma3_text": {**WIDE, **WINDOW, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": WINDOW,
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},  # states of another size than the layers
    "bloom": {},
    "falcon": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.1},
    "cohere2": {**WINDOW, "sliding_window_pattern": 2, "logit_scale": 0.1},
    "minicpm3": {**LATENT, "head_dim": 12, "dim_model_base": 16},  # scales its states before the output layer
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "phimoe": EXPERTS,
    "deepseek_v3": {**EXPERTS, **LATENT},
    "gpt_oss": {**EXPERTS, **WINDOW, "head_dim": 8},
    "llama4_text": {**EXPERTS, "head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 64},
}
HYBRIDS = {  # a part of their memory of a prompt is no keys and values
    "mamba": {},
    "recurrent_gemma": {},
    "qwen3_5_text": {
        **{"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
}


@torch.no_grad()
def _widen(module):
    """Standard deviation 1 / sqrt(inputs): differences between tokens are then large."""
    for weight in module.parameters(recurse=False):
        if weight.dim() > 1:
            weight.normal_(0, 1 if isinstance(module, torch.nn.Embedding) else weight[0].numel() ** -0.5)


def write(folder, auto, config, tokenizer, processor=None):
    """What a library user would have on disk."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).apply(_widen)
    for part in (model, tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)


def write_decoder(kind, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = type(AutoConfig.for_model(kind))(**{**TEXT, **(DECODERS | HYBRIDS)[kind]})
    write(folder, AutoModelForCausalLM, config, tiny_tokenizer())


# --- with images -----------------------------------------------------------------------------------------------------

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 32, "patch_size": 8}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "projection_dim": 64, "vision_use_head": False, **TOWER}
PIXTRAL = {
    "model_type": "pixtral",
    "head_dim": 16,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    **TOWER,
}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 64, "out_hidden_size": 64}
QWEN |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
SQUARE = {"height": 32, "width": 32}
PLACES = [[32, 64], [64, 32], [64, 64]]
VISION = {  # model_type: (text, vision, further, (module and class of the image processor, its options))
    "qwen2_vl": (ROPE, {**QWEN, "hidden_size": 64, "embed_dim": 32, "mlp_ratio": 2}, {}, None),
    "qwen3_vl": (ROPE, {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, {}, None),
    "qwen3_5": ({**ROPE, **LINEAR}, {**QWEN, "num_position_embeddings": 16}, {}, None),
    "idefics3": ("llama", TOWER, {"scale_factor": 2}, None),
    "llava": ("llama", CLIP, {"vision_feature_layer": -1}, ("clip.CLIP", {"crop_size": SQUARE, "size": SQUARE})),
    "llava_next": (
        "llama",
        CLIP,
        {"vision_feature_layer": -1, "image_grid_pinpoints": PLACES},
        ("llava_next.LlavaNext", {"size": SQUARE, "crop_size": SQUARE, "image_grid_pinpoints": PLACES}),
    ),
    "llava_onevision": (
        "qwen2",
        SIGLIP,
        {"vision_feature_layer": -1, "image_grid_pinpoints": PLACES},
        ("llava_onevision.LlavaOnevision", {"size": SQUARE, "image_grid_pinpoints": PLACES}),
    ),
    "gemma3": (
        {**WINDOW, "sliding_window_pattern": 2},
        SIGLIP,
        {"mm_tokens_per_image": 4, "boi_token_index": VISION_START, "eoi_token_index": VISION_END},
        ("gemma3.Gemma3", {"size": SQUARE}),
    ),
    "internvl": ("qwen2", {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}, {}, None),
    "mistral3": ("mistral", PIXTRAL, {}, None),
    "aya_vision": ("cohere2", SIGLIP, {"vision_feature_layer": -1, "downsample_factor": 2}, None),
}


def write_vlm(kind, folder):
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, VISION_START, VISION_END, AROUND, GLOBAL]})
    image, start, end = tokenizer.convert_tokens_to_ids([IMAGE, VISION_START, VISION_END])
    text, vision, further, processor = VISION[kind]
    text = {"model_type": text} if isinstance(text, str) else text
    text = {**TEXT, "hidden_size": 64, "head_dim": 16, "max_position_embeddings": 1024, **text}
    marks = {"image_token_id": image, "image_token_index": image, "tie_word_embeddings": False}
    marks |= {"vision_start_token_id": start, "vision_end_token_id": end, "video_token_id": 0}
    further = {
        k: {VISION_START: start, VISION_END: end}.get(v, v) if isinstance(v, str) else v for k, v in further.items()
    }
    config = type(AutoConfig.for_model(kind))(text_config=text, vision_config=vision, **marks, **further)
    made = None
    if processor is not None:
        module, name = processor[0].split(".")
        module = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
        made = getattr(module, f"{name}ImageProcessorPil")(**processor[1])
    write(folder, AutoModelForImageTextToText, config, tokenizer, made)
