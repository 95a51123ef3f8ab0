"""What ends a reply: every end token that tokenizer, configurations or chat template of a checkpoint name."""

import gymnasium
import numpy as np
import pytest

from embodied_rft.agents.models.causal_lm import CausalLM
from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm, tiny_tokenizer
from embodied_rft.learning.agent import build_agent
from tests.lab.draws import generator as rng

TEXT = gymnasium.spaces.Text(200)
SPACE = gymnasium.spaces.Dict({"prompt": TEXT})


TEXT_END, TURN_END, OTHER_END = "<|endoftext|>", "<|im_end|>", "<|eot_id|>"
CHATML = (
    "{% for m in messages %}<|user|>{{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def ending(*, own, config=None, generation=None, template=None, pad="<|pad|>"):
    """A random model whose parts name the tokens that end a text by these names."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_END, OTHER_END]})
    size = {"hidden_size": 32, "vocab_size": len(tokenizer) + 10}
    model, _ = tiny_causal_lm(TinyConfig(**size), rng=rng())
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = own, pad, template

    def number(names):
        if isinstance(names, list):
            return [number(name) for name in names]
        return names if names is None or isinstance(names, int) else tokenizer.convert_tokens_to_ids(names)

    model.config.eos_token_id, model.generation_config.eos_token_id = number(config), number(generation)
    return model, tokenizer


@pytest.mark.parametrize(
    ("parts", "expected", "written"),
    [
        ({"own": TURN_END, "config": TEXT_END}, {TEXT_END, TURN_END}, TURN_END),  # base models
        ({"own": TEXT_END, "config": TURN_END}, {TEXT_END, TURN_END}, TEXT_END),
        ({"own": TEXT_END, "generation": [TURN_END, OTHER_END]}, {TEXT_END, TURN_END, OTHER_END}, TEXT_END),
        ({"own": TEXT_END, "config": [TEXT_END, OTHER_END]}, {TEXT_END, OTHER_END}, TEXT_END),
        ({"own": TEXT_END, "template": CHATML}, {TEXT_END, TURN_END}, TURN_END),  # only the template tells
        ({"own": None, "generation": [TURN_END]}, {TURN_END}, TURN_END),
        ({"own": TEXT_END, "config": TEXT_END, "pad": TEXT_END}, {TEXT_END}, TEXT_END),
        ({"own": TEXT_END, "generation": [TEXT_END, 271, 9_999]}, {TEXT_END}, TEXT_END),  # never drawn
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # workers of a test run must agree
)
def test_whatever_a_part_of_a_checkpoint_ends_a_text_with_ends_a_reply(tmp_path, parts, expected, written):
    model, tokenizer = ending(**parts)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = "chat" if "template" in parts else "plain"
    spec = {"id": "language", "model": str(tmp_path), "prompt": prompt, "max_new_tokens": 400}
    policy = build_agent(spec, SPACE, TEXT, rng()).policy
    assert set(policy.tokenizer.convert_ids_to_tokens(sorted(policy.lm.eos))) == expected
    taken = policy.act({"prompt": ["a", "b"] * 40}, rng=rng(1))
    last = policy.tokenizer.convert_ids_to_tokens([int(row[-1]) for row in taken.trace["reply"]])
    assert set(last) <= expected | {last[i] for i in np.flatnonzero(taken.trace["cut"])} and expected <= set(last)
    for row in taken.trace["reply"]:
        assert not policy.lm.eos & set(row[:-1].tolist())  # nothing goes on behind an end
    (reply,) = policy.retrace({"prompt": ["a"]}, ["b"])["reply"]
    assert policy.tokenizer.convert_ids_to_tokens(reply.tolist()) == ["b", written]
    log_prob, _ = policy.log_prob({"prompt": ["a", "b"] * 40}, taken.action, taken.trace)
    assert np.abs(log_prob.detach().numpy() - taken.log_prob.pad()[0]).max() < 1e-5


def test_an_end_that_is_ordinary_text_is_obeyed_and_said(caplog):
    model, tokenizer = ending(own=TEXT_END, config="X")
    assert tokenizer.convert_ids_to_tokens(sorted(CausalLM(model, tokenizer).eos)) == [TEXT_END, "X"]
    assert "'X'" in caplog.text and "replies end there" in caplog.text
