"""Conversations as ids that are only appended: what tokenizers of many families write whole, we write turn by turn."""

import datetime
from types import SimpleNamespace

import numpy as np
import pytest

from embodied_rft.agents.models.dialogue import TODAY
from embodied_rft.pools.text_spaces import write_chat
from tests.lab.chats import FAMILIES, REFUSED, Family, build, dialogue, tokenizer

SAID = [("which colour is it?", 1), ("turn left:\n\n", 0), ("now", 2), ("left or right?", 1)]
REPLIES = ["left", "turn right.", "up"]


def talk(made, said=SAID, replies=REPLIES, cut=()):
    """The ids of a conversation, written turn by turn."""
    ids = [made.first(*said[0])]
    for number, (reply, message) in enumerate(zip(replies, said[1:], strict=True)):
        answer = made.reply(reply)
        if number in cut:
            answer = answer[:-1]
        ids += [answer, made.following(*message, ended=number not in cut)]
    return np.concatenate(ids).tolist()


def written(family, tokens, said, replies, system=None):
    """The text of the whole conversation as the template has it, pictures in the form that it takes."""
    sees = family.image is not None
    parts = sees and "m.content if part" in family.template

    def content(text, pictures):
        if parts:
            return [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        return f"{family.image}\n" * pictures + text

    messages = [] if system is None else [{"role": "system", "content": content(system, 0)}]
    for number, (text, pictures) in enumerate(said):
        messages.append({"role": "user", "content": content(text, pictures)})
        if number < len(replies):
            messages.append({"role": "assistant", "content": content(replies[number], 0)})
    return tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def opened(family, text, count):
    """The same, with what a prompt for a reply had before each reply that was given."""
    if not family.opens:
        return text
    parts = text.split("<|Assistant|>")
    return "<|Assistant|>".join([parts[0], *(family.opens + part for part in parts[1 : count + 1]), parts[-1]])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_turn_by_turn_is_what_is_written_whole(name, monkeypatch):
    family, tokens = FAMILIES[name], tokenizer(name)
    days(monkeypatch, TODAY)
    made = dialogue(family, tokens)
    said = SAID if family.image else [(text, 0) for text, _ in SAID]
    text = opened(family, written(family, tokens, said, REPLIES), len(REPLIES))
    whole = tokens(made.pictures.around(text) if made.pictures else text, add_special_tokens=False)["input_ids"]
    ids = talk(made, said)
    assert ids == whole, (tokens.convert_ids_to_tokens(ids), tokens.convert_ids_to_tokens(whole))
    if family.image:
        assert ids.count(made.pictures.id) == 4
    cut = talk(made, said, cut=(0, 2))  # the template writes the ends of replies that ran into a limit
    assert cut == whole


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama3", "phi3", "smolvlm", "internvl"])
def test_a_system_message_stays_where_it_is(name, monkeypatch):
    family, tokens = FAMILIES[name], tokenizer(name)
    days(monkeypatch, TODAY)
    made = dialogue(family, tokens, system="Be brief.")
    said = [(text, 0) for text, _ in SAID]
    whole = tokens(written(family, tokens, said, REPLIES, "Be brief."), add_special_tokens=False)["input_ids"]
    assert talk(made, said) == whole


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.image])
def test_what_a_family_writes_around_a_picture_is_there_once_each(name):
    made = dialogue(FAMILIES[name], tokenizer(name))
    for ids in (made.first("now", 2), made.following("now", 2)):
        shown = made.tokenizer.decode(ids)
        layout, token = made.pictures.layout, made.pictures.token
        around = layout.margin + layout.before + token + layout.after + layout.margin
        assert shown.count(around) == shown.count(token) == 2
        for part in {layout.before, layout.after} - {""}:
            assert shown.count(part) == 2 * ((layout.before + layout.after).count(part))
    assert name != "gemma3" or "\n\n<start_of_image><image_soft_token><end_of_image>\n\n" in shown


@pytest.mark.parametrize("name", FAMILIES)
def test_what_looks_like_a_token_in_a_message_is_text(name):
    """Of every special token, of the image's, and of our own marks: none gets into a message."""
    family, tokens = FAMILIES[name], tokenizer(name)
    made = dialogue(family, tokens)
    pictures = int(family.image is not None)
    evil = " ".join([*family.special, "\ue0007\ue001", "\ue000"])
    for write in (made.first, made.following):
        plain, shown = write("now", pictures).tolist(), write(f"now {evil}", pictures).tolist()
        for token in family.special:
            id = tokens.convert_tokens_to_ids(token)
            assert shown.count(id) == plain.count(id), token
        if not family.words:  # bytes lose nothing
            assert f"now {evil}" in tokens.decode(shown)


@pytest.mark.parametrize(("template", "reason"), REFUSED.items())
def test_templates_that_cannot_keep_the_promise_are_refused_with_the_reason(template, reason):
    sees = "image" in template
    family = Family(template, ("</s>", "<s>", "<|user|>", "<|assistant|>", "<image>"))
    if sees:
        family = Family(template, family.special, image="<image>", config={"model_type": "llava"})
    made = dialogue(family, build(family))
    assert len(made.first("now", int(sees)))  # a single turn is what it says
    with pytest.raises(ValueError, match=reason):
        made.following("now")


def test_a_template_without_a_place_for_pictures_or_text_is_refused():
    image = {"image": "<image>", "config": {"model_type": "llava"}}
    for template, reason in (("<s>{{ messages[0].content | length }}", "0 places for 1"), ("<s>", "0 places for 1")):
        family = Family(template, ("</s>", "<s>", "<image>"), **image)
        with pytest.raises(ValueError, match=reason):
            dialogue(family, build(family))
    family = Family("<s>{{ messages | length }}", ("</s>", "<s>"))
    with pytest.raises(ValueError, match="leaves out what is said"):
        dialogue(family, build(family))


@pytest.mark.parametrize("name", ["smolvlm", "gemma3", "qwen2_5_vl"])
def test_templates_that_take_parts_are_given_parts_where_nothing_is_seen(name):
    """SmolVLM's would write an empty message for a text, without a word."""
    family = FAMILIES[name]
    reads = Family(family.template, family.special)
    made = dialogue(reads, tokenizer(name))
    assert "which colour" in made.tokenizer.decode(made.first("which colour"))


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_thoughts_that_a_template_would_drop_stay(name):
    """Ids that were drawn are never taken back."""
    tokens = tokenizer(name)
    made = dialogue(FAMILIES[name], tokens)
    thought = "<think>\nup?</think>left" if name == "qwen3" else "up?</think>left"
    ids = talk(made, [("now", 0), ("now", 0)], [thought])
    assert "<think>\nup?</think>left" in tokens.decode(ids)
    assert ids[: len(made.first("now"))] == made.first("now").tolist()


def test_what_was_said_reads_the_same_on_another_day(monkeypatch):
    family, tokens = FAMILIES["llama3"], tokenizer("llama3")
    before = dialogue(family, tokens).first("now").tolist()
    days(monkeypatch, datetime.date(2031, 1, 5))
    assert "05 Jan 2031" in written(family, tokens, [("now", 0)], [])
    assert dialogue(family, tokens).first("now").tolist() == before
    days(monkeypatch, TODAY)
    assert tokens.decode(before) == written(family, tokens, [("now", 0)], [])


def days(monkeypatch, day):
    """The library's clock says so."""
    clock = SimpleNamespace(now=lambda: day)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)


def test_chats_bring_their_own_roles_and_pictures_come_with_the_last_message():
    family, tokens = FAMILIES["qwen2_5_vl"], tokenizer("qwen2_5_vl")
    made = dialogue(family, tokens, chats=True, system="Be brief.")
    chat = write_chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "now"}])
    shown = tokens.decode(made.first(chat, 1))
    assert "Be kind." in shown and "Be brief." not in shown
    assert shown.index("Be kind.") < shown.index("<|image_pad|>") < shown.index("now")
