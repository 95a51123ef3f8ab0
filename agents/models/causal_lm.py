"""A Hugging Face causal language model taken apart into decoder, output layer and tokenizer, checked to fit together.

Boundary: loading, checking, choosing what is trained, saving. Knows no sampling and no policy; transformers and peft
are imported when a model is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft.agents.models.pretrained import (
    check_tokenizer,
    checkpoint_layers,
    close,
    decoder_of,
    end_of_turn,
    load_pretrained,
    output_form,
)
from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm
from embodied_rft.data import Ragged
from embodied_rft.names import UserError
from embodied_rft.networks.trainable import LoraOptions, Train, adapters_of, add_adapters, linear_layers, merged
from embodied_rft.tokens.log_probs import Head

STATEFUL = ("linear", "mamba", "conv", "recurrent", "hybrid")  # in names of kinds of layers: no keys and values alone
WRONG = (
    "looks ahead, or computes something else when rows are padded to one length",
    "computes something else when a prompt is continued from its keys and values",
)


class CausalLM:
    """A model and its tokenizer.

    Args:
        model: a Hugging Face `...ForCausalLM`, or a vision-language model that will see no image.
        tokenizer: a fast tokenizer.
        continues: whether prompts of tokens alone will be continued from keys and values, which is then checked.

    Raises:
        ValueError: the tokenizer does not belong to the model, or the model is no decoder as it is expected here.
    """

    def __init__(self, model: Any, tokenizer: Any, *, continues: bool = True) -> None:
        config = model.config.get_text_config()
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        if getattr(model.config, "is_encoder_decoder", False):
            self._refuse("it has an encoder and a decoder")
        kinds = {k for k in getattr(config, "layer_types", None) or () if any(word in str(k) for word in STATEFUL)}
        if continues and kinds:
            self._refuse(f"its layers of kind {', '.join(sorted(kinds))} keep a state that a group cannot share")
        self.eos = check_tokenizer(model, tokenizer)
        read, self.scale, self.softcap = output_form(model)
        self.decoder: nn.Module = decoder_of(model)
        own = self._states(torch.arange(read.shape[1], device=read.device)[None])
        if not close(own, read):  # MiniCPM scales its states before the output layer
            factor = float((own * read).sum() / own.square().sum()) if own.shape == read.shape else 1.0
            if not close(factor * own, read) or model.get_output_embeddings().bias is not None:
                self._refuse("it changes its states before the output layer")
            self.scale *= factor
        self.hidden_size: int = read.shape[-1]
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        size = model.get_output_embeddings().weight.shape[0]
        used = torch.zeros(size, dtype=torch.bool)
        used[[token for token in tokenizer.get_vocab().values() if token < size]] = True
        self._used = None if bool(used.all()) else used  # embeddings are often padded to a round number
        if continues:
            self._check_states()

    def head(self, temperature: float = 1.0) -> Head:
        """The output layer at a sampling temperature."""
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, scale=self.scale, softcap=self.softcap, temperature=temperature)

    @property
    def allowed(self) -> Tensor | None:
        """[V] bool, the tokens that the tokenizer knows; None: all."""
        return None if self._used is None else self._used.to(self.model.device)

    def end_of(self, prompt: Literal["chat", "plain"]) -> int:
        """The token written behind a given reply: the chat template's end of a turn, or the end of a text."""
        turn, text = end_of_turn(self.tokenizer), self.tokenizer.eos_token_id
        first, second = (turn, text) if prompt == "chat" else (text, turn)
        chosen = second if first is None else first
        return min(self.eos) if chosen is None else int(chosen)

    def check_ids(self, *ids: np.ndarray) -> None:
        """Refuse token ids that the model does not have."""
        size = self.model.get_output_embeddings().weight.shape[0]
        for some in ids:
            if len(some) and (some.min() < 0 or some.max() >= size):
                raise UserError(
                    f"token ids from {some.min()} to {some.max()} were given to a model of {size} tokens: these "
                    "decisions were taken with another tokenizer. Collect them again with this model."
                )

    def _refuse(self, reason: str, error: Exception | None = None) -> None:
        raise UserError(
            f"{type(self.model).__name__} is refused: {reason}. A decoder is expected whose layers all attend to the "
            "keys and values of the whole prompt (Llama, Qwen 2 and 3, Mistral, Gemma, ...: see docs/text.md)"
        ) from error

    @torch.no_grad()
    def _check_states(self) -> None:
        """Refuse what does not compute, padded or continued from keys and values, what it computes for a row alone.

        Such are state-space models and linear attention, encoders, and models that take no positions.
        """
        from embodied_rft.tokens.decoder import Decoder
        from embodied_rft.tokens.prefix import reply_states

        tokens = np.random.default_rng(0).integers(0, len(self.model.get_output_embeddings().weight), (4, 12))
        cuts = ((9, 3), (9, 2), (5, 4), (5, 1))  # members share their prompt
        for row in (1, 3):
            tokens[row, : cuts[row][0]] = tokens[row - 1, : cuts[row][0]]
        prompts = Ragged.of([row[:p] for row, (p, _) in zip(tokens, cuts, strict=True)], dtype=np.int64)
        replies = Ragged.of([row[p : p + r] for row, (p, r) in zip(tokens, cuts, strict=True)], dtype=np.int64)
        rows = torch.from_numpy(tokens).to(self.model.device)
        try:
            alone = torch.cat(
                [self._states(row[None, : p + r])[0, p - 1 : p + r - 1] for row, (p, r) in zip(rows, cuts, strict=True)]
            )
            ways = [
                reply_states(Decoder(self.decoder), prompts, replies, share=share, overhead=0)
                for share in (False, True)
            ]
        except Exception as error:  # a model of another kind fails in its own ways
            self._refuse(f"it does not take the keys and values of a prompt ({error})", error)
        for way, what in zip(ways, WRONG, strict=True):
            if not close(way, alone):
                self._refuse(f"it {what}")

    @torch.no_grad()
    def _states(self, ids: Tensor) -> Tensor:
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state

    def select(self, train: Train, *, lora: LoraOptions, rng: torch.Generator, apart: bool = False) -> None:
        """Freeze everything but what is to be trained (see `tuning.tune`); the head is the output layer.

        `apart`: whoever owns the model has chosen already, but for the output layer.
        """
        model, layer = self.model, self.model.get_output_embeddings()
        if "head" in train and layer.weight is model.get_input_embeddings().weight:
            raise UserError(
                f'train "{train}": the output layer of this model is also its input embedding, which would change '
                'with it; use train "lora" or "full"'
            )
        if not apart:
            if train.startswith("lora") and not adapters_of(model):
                inside = {id(part) for part in self.decoder.modules() if part is not layer}
                add_adapters(model, lora, rng, layers={n for n, m in linear_layers(model).items() if id(m) in inside})
            model.requires_grad_(train == "full")
            for name, parameter in model.named_parameters() if train.startswith("lora") else ():
                parameter.requires_grad_("lora_" in name)
        layer.requires_grad_(train in ("full", "lora+head", "head"))

    def checkpoint_layers(self) -> None:
        """Compute each layer twice instead of keeping its activations (Chen et al. 2016).

        Our caches keep no state of their own in the backward pass, so they may stay when layers are computed again.
        """
        checkpoint_layers(self.model)
        layers = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in layers:
            layer._can_checkpoint_with_cache = True
        self.model.train()  # Hugging Face checkpoints only in training mode; all dropout is off
        try:
            self._check_states()
        except ValueError as error:  # GPT-2 drops its keys and values then
            raise UserError(
                f"{type(self.model).__name__} does not continue a prompt from keys and values with "
                "gradient_checkpointing, which computes its layers twice: leave it off"
            ) from error

    def save(self, folder: Path) -> None:
        """Write model and tokenizer, adapters merged into the weights."""
        merged(self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_model(
    source: str | dict[str, TinyConfig], *, dtype: Literal["fp32", "bf16"], rng: torch.Generator
) -> CausalLM:
    """A model by folder or hub id, or {"tiny": {...}} with random weights.

    Raises:
        ValueError: nothing is there, it is no causal language model, or model and tokenizer do not fit.
    """
    if isinstance(source, dict):
        if list(source) != ["tiny"]:
            raise UserError(
                f'model is {source!r}; expected a folder, a hub id, or {{"tiny": {{...}}}} for random weights'
            )
        model, tokenizer = tiny_causal_lm(source["tiny"], rng=rng)
        return CausalLM(model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]), tokenizer)
    kinds = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    _, model, tokenizer = load_pretrained(source, kinds, what="causal language model", dtype=dtype)
    return CausalLM(model, tokenizer)
