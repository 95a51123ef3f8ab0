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

from embodied_rft.agents.tiny_lm import TinyConfig, tiny_causal_lm
from embodied_rft.token_loss import Head
from embodied_rft.tuning import LoraOptions, Train, add_adapters, is_adapted, linear_layers, merged


class CausalLM:
    """A model and its tokenizer.

    Args:
        model: a Hugging Face `...ForCausalLM`.
        tokenizer: a fast tokenizer.
        continues: whether prompts of tokens alone will be continued from keys and values, which is then checked.

    Raises:
        ValueError: the tokenizer does not belong to the model, or the model's logits are not what its output layer
            gives.
    """

    def __init__(self, model: Any, tokenizer: Any, *, continues: bool = True) -> None:
        config = model.config.get_text_config()
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.decoder: nn.Module = model.base_model
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.eos = _check_tokenizer(model, tokenizer)
        size = model.get_output_embeddings().weight.shape[0]
        used = torch.zeros(size, dtype=torch.bool)
        used[list(tokenizer.get_vocab().values())] = True
        self._used = None if bool(used.all()) else used  # embeddings are often padded to a round number
        self._check_head()
        if continues:
            self._check_cache()

    def head(self, temperature: float = 1.0) -> Head:
        """The output layer at a sampling temperature."""
        layer, config = self.model.get_output_embeddings(), self.config
        if type(layer) is not nn.Linear:
            raise ValueError(f"the output layer is a {type(layer).__name__}; a plain linear layer is expected")
        # Granite divides its logits, Cohere multiplies them.
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(layer.weight, layer.bias, scale=scale, softcap=softcap, temperature=temperature)

    @property
    def allowed(self) -> Tensor | None:
        """[V] bool, the tokens that the tokenizer knows; None: all."""
        return None if self._used is None else self._used.to(self.model.device)

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(min(3, self.model.get_output_embeddings().weight.shape[0]), device=self.model.device)[None]
        expected = self.model(input_ids=ids).logits.float()
        given = self.head().logits(self.decoder(input_ids=ids).last_hidden_state)
        if not torch.allclose(expected, given, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits in a way that is not known here (known: logit_scale, "
                "logits_scaling, final_logit_softcapping): its log-probabilities would be wrong, so it is refused"
            )

    @torch.no_grad()
    def _check_cache(self, when: str = "") -> None:
        """Refuse decoders that cannot continue a prompt from its keys and values (state-space, linear attention)."""
        from embodied_rft.data import Ragged
        from embodied_rft.prefix import reply_states

        ids = min(3, self.model.get_output_embeddings().weight.shape[0]) - 1
        prompts, replies = Ragged.of([[ids, 0]] * 2, dtype=np.int64), Ragged.of([[0, ids], [ids, ids]], dtype=np.int64)
        try:
            plain, shared = (
                reply_states(self.decoder, prompts, replies, num_layers=self.num_layers, share=share, overhead=0)
                for share in (False, True)
            )
            same = torch.allclose(plain, shared, rtol=0, atol=5e-2 * float(plain.abs().max()))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            same, reason = False, f" ({error})"
        else:
            reason = ""
        if not same:
            raise ValueError(
                f"{type(self.model).__name__} does not continue a prompt from keys and values as a Transformer decoder "
                f"does{when}{reason}: its replies would be wrong, so it is refused"
            )

    def select(self, train: Train, *, lora: LoraOptions, rng: torch.Generator) -> None:
        """Freeze everything but what is to be trained (see `tuning.tune`); the head is the output layer."""
        model, layer = self.model, self.model.get_output_embeddings()
        if "head" in train and layer.weight is model.get_input_embeddings().weight:
            raise ValueError(
                f'train "{train}": the output layer of this model is also its input embedding, which would change '
                'with it; use train "lora" or "full"'
            )
        if train.startswith("lora") and not is_adapted(model):
            add_adapters(model, lora, rng, layers={n for n, m in linear_layers(model).items() if m is not layer})
        model.requires_grad_(train == "full")
        for name, parameter in model.named_parameters() if train.startswith("lora") else ():
            parameter.requires_grad_("lora_" in name)
        layer.requires_grad_(train in ("full", "lora+head", "head"))

    def checkpoint_layers(self) -> None:
        """Compute each layer twice instead of keeping its activations (Chen et al. 2016).

        Our caches keep no state of their own in the backward pass, so they may stay when layers are computed again.
        """
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        layers = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in layers:
            layer._can_checkpoint_with_cache = True
        self.model.train()  # Hugging Face checkpoints only in training mode; all dropout is off
        self._check_cache(" with gradient_checkpointing")  # GPT-2 drops the cache then

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
    number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if isinstance(source, dict):
        if list(source) != ["tiny"]:
            raise ValueError(
                f'model is {source!r}; expected a folder, a hub id, or {{"tiny": {{...}}}} for random weights'
            )
        model, tokenizer = tiny_causal_lm(source["tiny"], rng=rng)
        return CausalLM(model.to(number), tokenizer)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if source.startswith((".", "/", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise ValueError(f"model folder {source!r} does not exist; expected one that save_pretrained has written")
    try:
        config = AutoConfig.from_pretrained(source)
        text = config.get_text_config()
        for name, value in vars(text).items():
            if "drop" in name and isinstance(value, float):
                setattr(text, name, 0.0)  # a decision that is scored again must get the same probability
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=number)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model {source!r} cannot be loaded as a causal language model: {reason}") from error
    return CausalLM(model, tokenizer)


def _check_tokenizer(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply. Raises ValueError when tokenizer and model do not belong together."""
    rows = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has token ids up to {largest}, the model knows {rows} tokens: they do not belong together. "
            "Load the tokenizer that was saved with the model, or resize the model's embeddings."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token): a reply could never end; set one and save it again"
        )
    known: set[int] = set()
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        known |= set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    if known and tokenizer.eos_token_id not in known:
        raise ValueError(
            f"the tokenizer ends a text with token {tokenizer.eos_token_id} ({tokenizer.eos_token!r}), the model with "
            f"{sorted(known)}: they do not belong together. Load the tokenizer that was saved with the model."
        )
    return frozenset({tokenizer.eos_token_id, *(token for token in known if token < rows)})
