"""Tiny random language models and a tokenizer built on the spot: the code path of real checkpoints without a download.

Boundary: makes Hugging Face objects; knows no policy. transformers is imported when a model is made, because it takes
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic.dataclasses import dataclass

from embodied_rft.names import UserError
from embodied_rft.options import STRICT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(config=STRICT, kw_only=True)
class TinyConfig:
    """Size of a random model."""

    kind: Literal["qwen2", "llama", "gpt2"] = "qwen2"  # "gpt2": positions are learned, not rotary
    hidden_size: int = 64  # width
    num_layers: int = 2  # depth
    num_heads: int = 4  # of attention
    num_kv_heads: int = 2  # of attention, shared
    vocab_size: int | None = None  # rows of the embedding; None: as many as the tokenizer knows
    tie_embeddings: bool = False  # output layer and embedding are one
    max_tokens: int = 4096  # longest context


def tiny_tokenizer(*, merges: int = 0, corpus: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template: 256 bytes, four special tokens, and `merges` learned pairs.

    Args:
        merges: how many pairs to learn at most.
        corpus: texts to learn them from.

    Raises:
        ValueError: merges without a corpus.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if merges and not corpus:
        raise UserError(f"merges is {merges}, but there is no corpus to learn them from; give one, or merges=0")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, EOS, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_causal_lm(
    config: TinyConfig | None = None, *, rng: torch.Generator, tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[Any, PreTrainedTokenizerFast]:
    """(model, tokenizer): a random decoder with an output layer, float32, on the CPU.

    Args:
        config: its size.
        rng: draws the weights.
        tokenizer: None: one of bytes (`tiny_tokenizer`).

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    config = config or TinyConfig()
    tokenizer = tokenizer or tiny_tokenizer()
    vocab_size = config.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise UserError(f"vocab_size is {vocab_size}: smaller than the tokenizer, which has {len(tokenizer)} tokens")
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 3 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_tokens,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.kind == "gpt2":
        del shape["num_key_value_heads"]
        shape |= {"n_inner": shape.pop("intermediate_size"), "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    family = {"qwen2": Qwen2Config, "llama": LlamaConfig, "gpt2": GPT2Config}[config.kind]
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
        model = AutoModelForCausalLM.from_config(family(**shape), dtype=torch.float32)
    return model, tokenizer
