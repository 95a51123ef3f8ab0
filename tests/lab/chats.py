"""Tokenizers of many families, built on the spot: small, with their special tokens and their way to write chats.

The templates are ours, in the form of each family: what they write around messages, pictures and replies.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

from embodied_rft.agents.models.dialogue import Dialogue
from embodied_rft.agents.models.pretrained import end_of_turn
from embodied_rft.agents.models.processing import Places, layout_of

# How Llama 3 and Qwen cut texts before they merge bytes: what ends a line is a piece of its own.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["which colour is it?\n\nturn left, turn right\n", "left right up\n\n", "user assistant model question"] * 4
IMAGES = "{% for part in m.content if part.type == 'image' %}IMAGE{% endfor %}"
TEXTS = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
LOOP, END = "{% for m in messages %}", "{% endfor %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family writes conversations."""

    template: str
    special: tuple[str, ...]  # the first one ends a text
    words: bool = False  # a blank begins a word (sentencepiece), also the first one of a text; else bytes (GPT-2)
    image: str | None = None  # stands for a picture
    config: dict = dataclasses.field(default_factory=dict)  # of the model: {"model_type": ..., name: token}
    opens: str = ""  # what a prompt for a reply has, and later turns have not
    strips: bool = False  # the token that ends a turn takes the blanks behind it


QWEN3 = (
    LOOP
    + "{% set said = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}"
    + CHATML.removeprefix(LOOP).replace("m.content", "said")
)
LLAMA3 = (
    "{{ bos_token }}" + LOOP
    + "{% if loop.first and m.role != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today is {{ strftime_now('%d %b %Y') }}.<|eot_id|>{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>" + END
    + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)  # fmt: skip
GEMMA3 = (
    "{{ bos_token }}" + LOOP + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + IMAGES.replace("IMAGE", "<start_of_image>") + TEXTS.replace("part.text", "part.text | trim")
    + "<end_of_turn>\n" + END + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)  # fmt: skip
MISTRAL = (
    "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}" + END
)  # fmt: skip
PHI3 = LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END
PHI3 += "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
SMOLVLM = (
    "<|im_start|>" + LOOP + "{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
    + IMAGES.replace("IMAGE", "<image>") + TEXTS + "<end_of_utterance>\n" + END
    + "{% if add_generation_prompt %}Assistant:{% endif %}"
)  # fmt: skip
VICUNA = LOOP + "{% if m.role == 'assistant' %}ASSISTANT: " + TEXTS + "</s>{% else %}USER: "
VICUNA += IMAGES.replace("IMAGE", "<image>\n") + TEXTS + " {% endif %}" + END
VICUNA += "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
QWEN_VL = CHATML.replace(
    "{{ m.content }}", IMAGES.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>") + TEXTS
)
DEEPSEEK = (
    "<s>" + LOOP + "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}" + END
    + "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)  # fmt: skip
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
AROUND_QWEN = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
BEGIN = ("</s>", "<s>")
FAMILIES = {
    "qwen2": Family(CHATML, ("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
    "qwen2_5_vl": Family(
        QWEN_VL,
        ("<|im_end|>", "<|im_start|>", "<|image_pad|>", *AROUND_QWEN.values()),
        image="<|image_pad|>",
        config={"model_type": "qwen2_5_vl", **AROUND_QWEN},
    ),
    "qwen3": Family(QWEN3, ("<|im_end|>", "<|im_start|>", "<think>", "</think>")),
    "llama3": Family(LLAMA3, ("<|eot_id|>", "<s>", "<|start_header_id|>", "<|end_header_id|>")),
    "gemma3": Family(
        GEMMA3,
        ("<end_of_turn>", "<s>", "<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        image="<image_soft_token>",
        config={"model_type": "gemma3", "boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"},
    ),
    "mistral": Family(MISTRAL, BEGIN, words=True),
    "mistral v3": Family(MISTRAL.replace("[/INST]{%", "[/INST]{%"), (*BEGIN, "[INST]", "[/INST]")),
    "phi3": Family(PHI3, ("<|end|>", "<|endoftext|>", *ROLES), words=True, strips=True),
    "smolvlm": Family(
        SMOLVLM,
        ("<end_of_utterance>", "<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>"),
        image="<image>",
        config={"model_type": "smolvlm"},
    ),
    "llava": Family(VICUNA, (*BEGIN, "<image>"), words=True, image="<image>", config={"model_type": "llava"}),
    "internvl": Family(  # its template takes texts
        CHATML, ("<|im_end|>", "<|im_start|>", "<image>"), image="<image>", config={"model_type": "internvl_chat"}
    ),
    "zephyr": Family(PHI3.replace("<|end|>", "</s>"), BEGIN, words=True),
    "deepseek": Family(DEEPSEEK, (*BEGIN, "<|User|>", "<|Assistant|>", "<think>", "</think>"), opens="<think>\n"),
}
REFUSED = {  # template: what is said of it
    LOOP + "{% if loop.last %}<|user|>{{ m.content }}</s>{% endif %}" + END + "<|assistant|>": "earlier turns change",
    LOOP + "{% if m.role == 'user' %}{{ m.content }} {% endif %}" + END + "<|assistant|>": "or are merged",
    LOOP + "<|{{ m.role }}|>{{ m.content }}{% if loop.last %} [new]{% endif %}</s>" + END + "<|assistant|>": (
        "earlier turns change"
    ),
    VICUNA.replace("</s>", ""): "not with the token that ends one",
}


@functools.cache
def tokenizer(name):
    """The tokenizer of a family."""
    return build(FAMILIES[name])


def build(family):
    """A tokenizer that learned a few words."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=family.words, unk_token=None))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    if not family.words:
        pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
        alphabet, made.decoder = pre_tokenizers.ByteLevel.alphabet(), decoders.ByteLevel()
    special = [AddedToken(text, rstrip=family.strips, special=True) for text in family.special]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    bos = "<s>" if "<s>" in family.special else None
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=family.special[0], bos_token=bos)
    fast.chat_template = family.template
    return fast


def places(family, tokens):
    """Where pictures go; None: the family sees none."""
    if family.image is None:
        return None
    ids = {name: tokens.convert_tokens_to_ids(text) for name, text in family.config.items() if name != "model_type"}
    config = SimpleNamespace(model_type=family.config["model_type"], **ids)
    return Places(tokens, image_token=tokens.convert_tokens_to_ids(family.image), layout=layout_of(config, tokens))


def dialogue(family, tokens, **options):
    """The conversation of a family."""
    end = end_of_turn(tokens)
    return Dialogue(
        tokens,
        "chat",
        end=tokens.eos_token_id if end is None else end,
        places=places(family, tokens),
        **options,
    )
