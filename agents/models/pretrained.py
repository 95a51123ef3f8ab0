"""Hugging Face checkpoints: loading them, and refusing what would silently give wrong numbers.

A folder must hold all weights, finite ones, and a tokenizer that belongs to them; an output layer must give the model's
own logits. Boundary: files to a checked model and tokenizer; knows no policy. transformers is imported when a model is
loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embodied_rft.names import UserError
from embodied_rft.tokens.log_probs import Head

logger = logging.getLogger(__name__)

NOISE = ("drop", "jitter")  # in names of numbers of a configuration: a decision scored again must get the same number
PRECISION = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # how far two ways to compute the same may be apart, relatively


def load_pretrained(
    source: str, kinds: Sequence[str], *, what: str, dtype: Literal["fp32", "bf16"]
) -> tuple[str, Any, Any]:
    """(folder or hub id, model, tokenizer) by `from_pretrained`.

    Args:
        source: a folder that `save_pretrained` has written, or a hub id.
        kinds: names of `AutoModel...` classes; the first that knows the architecture is taken.
        what: what is expected, for messages.
        dtype: of the weights.

    Raises:
        ValueError: nothing is there, it is something else, or its weights are incomplete, damaged or not finite.
    """
    import transformers

    if source.startswith((".", "/", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise UserError(f"model folder {source!r} does not exist; expected one that save_pretrained has written")
    if (Path(source) / "adapter_config.json").exists() and not (Path(source) / "config.json").exists():
        raise UserError(
            f"{source!r} holds adapters alone: save the whole model, merge_and_unload().save_pretrained(...)"
        )
    try:
        # Said outright: where it is not said, transformers asks on the terminal whether a folder's own code may run.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        _no_noise(config)
        autos = [getattr(transformers, kind) for kind in kinds]
        auto = next((a for a in autos if type(config) in a._model_mapping), None)
        if auto is None:
            raise UserError(f"it is a {config.model_type} model, which is none")
        number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        model, report = auto.from_pretrained(
            source,
            config=config,
            dtype=number,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever a library says about a folder that it cannot read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model {source!r} cannot be loaded as a {what}: {reason[:300]}") from error
    _check_weights(source, model, report)
    return source, model, tokenizer


def _check_weights(source: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse a file that lacks weights, has others than the model reads, or has NaN in them."""
    wrong = {
        "lacks weights": sorted(report["missing_keys"]),
        "has weights of another shape": sorted(str(key[0]) for key in report["mismatched_keys"]),
        "has weights that are not used": sorted(key for key in report["unexpected_keys"] if _is_inside(model, key)),
    }
    for what, names in wrong.items():
        if names:
            raise UserError(
                f"model {source!r} {what} of a {type(model).__name__}: {len(names)}, e.g. {names[0]!r}. Its files are "
                "incomplete, or its config.json belongs to another architecture: save or download it again"
            )
    bad = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise UserError(
            f"model {source!r} has NaN or infinity in {len(bad)} weights, e.g. {bad[0]!r}: take an earlier checkpoint"
        )


def _is_inside(model: nn.Module, key: str) -> bool:
    """Whether a weight would belong to a layer that the model has (a bias that it ignores), or to one more of them.

    Whole parts that this model does not have (a tower, a further head) may be left out.
    """
    module, parts = model, key.split(".")
    while len(parts) > 1 and parts[0] in module._modules and module._modules[parts[0]] is not None:
        module = module._modules[parts.pop(0)]  # type: ignore[assignment]
    return isinstance(module, nn.ModuleList) or (len(parts) == 1 and bool(module._parameters))


def _no_noise(config: Any) -> None:
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for name, value in vars(part).items() if part is not None else ():
            if any(word in name for word in NOISE) and isinstance(value, float):
                setattr(part, name, 0.0)


def decoder_of(model: Any) -> Any:
    """The language model inside, without its output layer."""
    places = (model.get_decoder(), model.base_model, *model.children())  # not all families say where it is
    inner = next(part for part in places if part is not model and hasattr(part, "get_output_embeddings"))
    return inner if inner.get_output_embeddings() is None else decoder_of(inner)


def checkpoint_layers(model: Any) -> None:
    """Compute each layer twice instead of keeping its activations, in training mode (Chen et al. 2016)."""
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{error} Leave gradient_checkpointing off.") from error


def distance(given: Tensor, expected: Tensor) -> float:
    """Relative error; infinite if the shapes differ."""
    if given.shape != expected.shape:
        return float("inf")
    return float((given.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9))


def close(given: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute the same agree up to the rounding of their precision."""
    return distance(given, expected) < PRECISION.get(expected.dtype, 1e-1)


def check_tokenizer(model: Any, tokenizer: Any, *, ends: bool = True) -> frozenset[int]:
    """The tokens that end a reply: whatever the tokenizer, the configurations or the chat template end a text with.

    A base model's tokenizer often ends turns, its configuration documents, and `generation_config` lists several.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer.
        ends: whether there has to be such a token.

    Raises:
        ValueError: the model has no embedding for a token, or nothing could ever end a reply.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = min(layer.weight.shape[0] for layer in layers if layer is not None)
    image = getattr(model.config, "image_token_id", None)  # its place is taken by features: it needs no embedding
    known = set(tokenizer.get_vocab().values())
    largest = max(token for token in known if token != image)
    if largest >= rows:
        raise UserError(
            f"the tokenizer has token ids up to {largest}, the model knows {rows} tokens: they do not belong together. "
            "Load the tokenizer that was saved with the model, or resize the model's embeddings."
        )
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found |= {eos} if isinstance(eos, int) else set(eos or ())
    found &= known  # what the tokenizer does not know is never drawn
    if ends and not found:
        raise UserError(
            "neither the tokenizer (eos_token) nor the model's configuration has an end token that the tokenizer "
            "knows: a reply could never end; set tokenizer.eos_token and save it again"
        )
    if ordinary := sorted(found - _special(tokenizer)):
        written = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in ordinary)
        logger.warning(
            "the model's configuration ends a text with token %s, which its tokenizer takes for ordinary text: replies "
            "end there. If that is not meant, set eos_token_id in config.json and generation_config.json",
            written,
        )
    return frozenset(found)


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's turn; None if there is none."""
    if not tokenizer.chat_template:
        return None
    for form in (str, lambda text: [{"type": "text", "text": text}]):  # some templates lose what they do not take
        messages = [{"role": "user", "content": form("question")}, {"role": "assistant", "content": form("reply")}]
        try:
            shown = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # templates are programs; one that cannot be used is refused where a prompt is made of it
            continue
        _, said, behind = shown.rpartition("reply")
        if said:
            special, after = _special(tokenizer), tokenizer(behind, add_special_tokens=False)["input_ids"]
            return next((token for token in after if token in special), None)
    return None


@torch.no_grad()
def output_form(model: Any) -> tuple[Tensor, float, float | None]:
    """What the output layer reads for the tokens 0, 1, 2 [1, 3, H], and how its result is (scale, softcap)-ed.

    Families scale their logits (Granite, Cohere) or cap them (Gemma 2), and some have the number in their configuration
    but do not use it. So the model is asked: the layer is given small and large states, and the form is the known one
    that explains the logits.

    Raises:
        ValueError: none does.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(layer, nn.Linear):
        raise UserError(f"the output layer is a {type(layer).__name__}; a plain linear layer is expected")
    weight: Tensor = layer.weight
    read: list[Tensor] = []
    ids = torch.arange(min(3, len(weight)), device=weight.device)[None]
    size = (1, ids.shape[1], weight.shape[1])
    small = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(weight)
    seen = []
    try:
        for states in (small, 1000 * small):
            with _Instead(layer, states, read):
                seen.append((states, model(input_ids=ids, use_cache=False).logits))
    except Exception as error:  # a model of another kind fails in its own ways
        raise UserError(
            f"{type(model).__name__} cannot read three tokens ({error}): a causal language model is expected"
        ) from error
    number = {name: getattr(config, name, None) or None for name in (*SCALES, *CAPS)}
    scales = [1.0, *(SCALES[name](number[name]) for name in SCALES if number[name])]
    caps = [None, *(number[name] for name in CAPS if number[name])]
    forms = [Head(weight, layer.bias, scale=scale, softcap=cap) for scale in scales for cap in caps]
    errors = [max(distance(form.logits(states), logits) for states, logits in seen) for form in forms]
    best = min(range(len(forms)), key=errors.__getitem__)  # rounding may let several through
    if errors[best] < PRECISION.get(seen[0][1].dtype, 1e-1):
        return read[0], forms[best].scale, forms[best].softcap
    raise UserError(
        f"{type(model).__name__} changes its logits in a way that is not known here (known: {', '.join(number)}): its "
        "log-probabilities would be wrong, so it is refused"
    )


SCALES = {
    "logit_scale": float,
    "logits_scaling": lambda number: 1 / number,
    "lm_head_multiplier": float,
}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class _Instead:
    """While it lasts, a layer is given `states`; what it was given by the model is appended to `read`."""

    def __init__(self, layer: nn.Module, states: Tensor, read: list[Tensor]) -> None:
        def replace(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            read.append(given[0])
            return (states,)

        self.hook = layer.register_forward_pre_hook(replace)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()
