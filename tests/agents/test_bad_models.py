"""Folders, options and texts that cannot work: each is refused in a sentence that says what is wrong."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embodied_rft.data import Ragged
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.tokens.generation import Sampling, draw
from tests.agents.test_families import LONG, REPLY, SPACE, language, seen, vision
from tests.lab import helpers_vla
from tests.lab.draws import generator as rng
from tests.lab.families import write_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    agent = build_agent({"id": "language", "model": {"tiny": {"hidden_size": 32}}}, SPACE, REPLY, rng())
    agent.policy.save_pretrained(path)
    return path


def copied(folder, path):
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def weights(change):
    def edit(path):
        kept = load_file(path / "model.safetensors")
        change(kept)
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def config(**new):
    return lambda path: (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | new)
    )


def tokenizer(**new):
    def edit(path):
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(path)
        for name, value in new.items():
            setattr(made, name, value)
        made.save_pretrained(path)

    return edit


FILES = {
    "NaN": (weights(lambda w: w["model.norm.weight"].fill_(torch.nan)), "NaN or infinity in 1 weights.*norm.weight"),
    "missing": (weights(lambda w: w.pop("lm_head.weight")), "lacks weights.*lm_head.weight"),
    "shape": (weights(lambda w: w.update({"model.norm.weight": torch.ones(16)})), "another shape.*norm.weight"),
    "foreign": (config(model_type="llama"), "not used of a LlamaForCausalLM.*bias.*another architecture"),
    "kind": (config(model_type="vit"), "it is a vit model, which is none"),
    "fewer": (config(model_type="qwen3", num_hidden_layers=1, layer_types=None), "weights of a Qwen3"),
    "half": (lambda p: (p / "model.safetensors").write_bytes(b"no weights"), "cannot be loaded.*header"),
    "gone": (lambda p: (p / "model.safetensors").unlink(), "cannot be loaded.*no file named model.safetensors"),
    "json": (lambda p: (p / "config.json").write_text("{"), "cannot be loaded.*not a valid JSON"),
    "adapters": (lambda p: (p / "config.json").rename(p / "adapter_config.json"), "holds adapters alone"),
    "template": (tokenizer(chat_template="{{ raise_exception('only users') }}"), "template refuses user.*only users"),
}


@pytest.mark.parametrize("name", FILES)
def test_folders(name, folder, tmp_path):
    change, message = FILES[name]
    change(copied(folder, tmp_path))
    with pytest.raises(ValueError, match=message):
        language(tmp_path, prompt="chat")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"token_chunk": 0}, "token_chunk is 0"),
        ({"stop": [""]}, "empty text would end every reply"),
        ({"train": "lora", "lora": {"rank": 0}}, "at least 1, given rank 0"),
    ],
)
def test_options(options, message, folder):
    with pytest.raises(ValueError, match=message):
        language(folder, **options)


def test_layers_that_cannot_be_computed_twice():
    spec = {"id": "language", "model": {"tiny": {"kind": "gpt2"}}, "gradient_checkpointing": True}
    with pytest.raises(ValueError, match="with gradient_checkpointing.*leave it off"):
        build_agent(spec, SPACE, REPLY, rng())


def test_texts_and_ids(folder):
    policy = language(folder)
    for prompts, message in (("abc", "one text"), ([3], "3 is no text"), (["\ud800"], "valid Unicode")):
        with pytest.raises(ValueError, match=message):
            policy.act({"prompt": prompts}, rng=rng())
    assert len(policy.act({"prompt": ["héllo 😀 漢字"]}, rng=rng()).action) == 1
    trace = {"reply": Ragged.of([[5000]], dtype=np.int64)}
    with pytest.raises(ValueError, match="taken with another tokenizer"):
        policy.log_prob({"prompt": ["a"]}, [""], trace)


@pytest.mark.parametrize("adds", [True, False])
def test_a_plain_prompt_begins_as_the_tokenizer_begins_it(folder, tmp_path, adds):
    """GPT-2 has a begin token that it does not use; Llama's tokenizer adds one, and some add an end token, too."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(copied(folder, tmp_path))
    made.bos_token = "<|user|>"
    if adds:
        special = [(name, made.convert_tokens_to_ids(name)) for name in ("<|user|>", made.eos_token)]
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"<|user|> $A {made.eos_token}", special_tokens=special
        )
    made.save_pretrained(tmp_path)
    plain, chat = language(tmp_path), language(tmp_path, prompt="chat")
    ids, empty = (plain.prompt_ids({"prompt": [text]}).row(0).tolist() for text in ("ab", ""))
    own = AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"]
    assert ids == (own[:-1] if adds else own) and empty == [made.bos_token_id]
    begins = chat.prompt_ids({"prompt": ["ab"]}).row(0).tolist()
    assert begins.count(made.bos_token_id) == 1  # the template's own


def test_a_stop_text_of_several_tokens(folder, monkeypatch):
    policy = language(folder, stop=["ab"], max_new_tokens=20)
    coming = iter([policy.dialogue.reply(letter)[0] for letter in "xaxabyy"])

    def say(logits, *_):
        return torch.full((len(logits),), int(next(coming))), torch.zeros(len(logits))

    monkeypatch.setattr("embodied_rft.tokens.generation.draw", say)
    taken = policy.act({"prompt": ["q"]}, rng=rng())
    assert taken.action == ["xax"] and len(taken.trace["reply"].row(0)) == 5 and not taken.trace["cut"][0]


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_weights_that_left_all_bounds(folder):
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        draw(torch.tensor([[0.0, torch.inf, 1.0]]), Sampling(), rng())
    agent = build_agent({"id": "language", "model": str(folder)}, SPACE, REPLY, rng())
    assert agent.finite_state().keys() == agent.state_dict().keys()
    with torch.no_grad():
        next(agent.policy.parameters()).fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="'policy.*nothing was saved"):
        agent.finite_state()


@pytest.mark.parametrize("rates", [{"learning_rate": float("nan")}, {"learning_rates": {"critic": -1.0}}])
def test_learning_rates(rates):
    with pytest.raises(ValueError, match="at least 0"):
        LearnerConfig(**rates)


# --- with images -----------------------------------------------------------------------------------------------------


def test_images_and_processors(tmp_path):
    write_vlm("llava", tmp_path)
    policy, looked = vision(tmp_path), seen()
    bad = {
        "uint8 is expected": {"a": looked["a"].astype(np.float32)},
        "one of each kind a row": {"a": looked["a"][:1]},
        "exceed the model's context of 1024": {"prompt": [LONG * 20] * 3},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            policy.act(looked | change, greedy=True)
    with pytest.raises(ValueError, match="taken with another tokenizer"):
        policy.log_prob(looked, None, {"reply": Ragged.of([[5000]] * 3, dtype=np.int64)})
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="image processor of .* cannot be loaded"):
        vision(tmp_path)


def test_a_processor_that_has_to_be_there(tmp_path):
    write_vlm("llava_next", tmp_path)
    for file in tmp_path.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ValueError, match=re.escape("needs its own image processor (it wants image_sizes)")):
        vision(tmp_path)


def test_a_width_that_learning_shrinks_keeps_its_least():
    p, seen = helpers_vla.policy(head="parallel", parallel={"min_std": 0.02}), helpers_vla.observation()
    with torch.no_grad():
        p.head.log_std.fill_(-50.0)
    taken = p.act(seen, rng=helpers_vla.rng())
    trace = helpers_vla.tensors(taken.trace)
    log_prob, entropy = p.log_prob(helpers_vla.tensors(seen), None, trace)
    expected = torch.distributions.Normal(0.0, 0.02).entropy() * helpers_vla.STEP.shape[0]
    torch.testing.assert_close(entropy, expected.expand(entropy.shape))
    assert torch.isfinite(log_prob).all()
