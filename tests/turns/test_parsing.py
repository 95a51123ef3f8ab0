"""Answers in text: every form, every kind of invalid one, and that no text whatsoever makes a parser raise."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft import registry
from embodied_rft.turns.objects import Call, agreement, find_objects, read_calls, write_calls
from embodied_rft.turns.parsing import INVALID, Parsed, Parser, Tags, make_parser

MOVES = (("left", "right", "="),)
CELLS = (("0", "1", "-1"), ("0", "1", "-1"))
FREE = {"id": "tool_call"}  # calls of any tools
CALL = {"id": "tool_call", "tool": "act", "argument": "to"}
FORMS = ["tags", "json", "words", CALL, {"id": "tags", "tags": ["a", "b", "c"]}]
FORMS += [{**({"id": form} if isinstance(form, str) else form), "strict": True} for form in FORMS]


def parse(form, text, words=MOVES):
    return make_parser(form, words=words).parse(text)


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


READ = [  # form, reply, (action or kind, thought, said)
    ("tags", "<think>ice below</think><answer> left </answer>", "left", "ice below", "left"),
    ("tags", "It is ice.\n<answer>Left.</answer> Good luck", "left", "It is ice.", "Left."),
    ("tags", "ice</think><answer>left</answer>", "left", "ice", "left"),  # the prompt began the thought
    ("tags", "<answer>right</answer> no <answer>left</answer>", "left", "<answer>right</answer> no", "left"),
    ("tags", "<think>a <answer>b</think><answer>left</answer>", "left", "a <answer>b", "left"),
    ("tags", "<answer>left<|im_end|></answer>", "unknown_word", None, "left<|im_end|>"),
    ("tags", "<think>go</think><answer>\u5de6</answer>", "unknown_word", "go", "\u5de6"),
    ("tags", "<think>go</think><answer> \n</answer>", "empty", "go", ""),
    ("tags", "<think>hmm", "cut", "hmm", None),
    ("tags", "<think>hmm</think><answer>le", "cut", "hmm", None),
    ("tags", "left", "no_answer", "left", None),
    ("tags", " \n\t", "empty", None, None),
    ({"id": "tags", "strict": True}, "<think>a</think>\n<answer>=</answer>\n", "=", "a", "="),
    ({"id": "tags", "strict": True}, "so <think>a</think><answer>=</answer>", "outside", None, None),
    ({"id": "tags", "strict": True}, "<think>a</think><answer>=</answer>.", "outside", None, None),
    ({"id": "tags", "strict": True}, "<answer>=</answer><think>a</think>", "outside", None, None),
    ({"id": "tags", "strict": True}, "<think>a</think><answer>=</answer><answer>=</answer>", "several", None, None),
    ({"id": "tags", "strict": True}, "<think>a</think><answer>=", "cut", None, None),
    ("json", '{"thought": "ice", "action": "left"}', "left", "ice", "left"),
    ("json", 'Hm {?} ```json\n{"action": "LEFT", "thought": "late"}\n```', "left", "Hm {?} ```json", "LEFT"),
    ("json", '{"action": "right"} {"action": "left"}', "left", '{"action": "right"}', "left"),
    ("json", '{"action": ["left"]}', "left", None, '["left"]'),
    ("json", '{"action": null}', "unknown_word", None, "null"),
    ("json", '{"action": "\\ud800"}', "bad_json", None, "\\ud800"),
    ("json", '{"move": "left"}', "no_key", None, None),
    ("json", '{"action": left}', "bad_json", None, None),
    ("json", '{"action": "le', "cut", None, None),
    ("json", '{"a": ' * 50_000, "bad_json", None, None),
    ("json", '{"a": ' + "9" * 50_000, "bad_json", None, None),
    ("json", "left", "no_answer", None, None),
    ({"id": "json", "strict": True}, 'so {"action": "left"}', "outside", None, None),
    ({"id": "json", "strict": True}, '{"action": "left"}{"action": "left"}', "several", None, None),
    ("words", "I could go right, but no: **Left**!", "left", "I could go right, but no: **", "Left"),
    ("words", "rightly leftover", "unknown_word", None, "rightly leftover"),
    ("words", "2 + 2 = ", "=", "2 + 2", "="),
    ({"id": "words", "strict": True}, " Left.\n", "left", None, "Left."),
    ({"id": "words", "strict": True}, "go left", "unknown_word", None, "go left"),
    ({"id": "words", "strict": True, "ignore_case": False}, "Left", "unknown_word", None, "Left"),
    ({"id": "words", "strict": True, "ignore_punctuation": False}, "left.", "unknown_word", None, "left."),
    (CALL, f"ice\n<tool_call>\n{call('act', to='left')}\n</tool_call>", "left", "ice", call("act", to="left")),
    (CALL, f"<think>ice</think>{call('act', to='Left')}", "left", "ice", call("act", to="Left")),
    (CALL, '{"name": "act", "parameters": "{\\"to\\": \\"left\\"}"}', "left", None, ...),
    (CALL, call("jump", to="left"), "unknown_tool", None, ...),
    (CALL, call("act", at="left"), "no_key", None, ...),
    (CALL, call("act", to="left") * 2, "several", None, ...),
    (CALL, "<tool_call>{}</tool_call>", "bad_json", None, None),
    (CALL, "<tool_call>" + call("act", to="left"), "cut", None, None),
    (CALL, '{"name": "act", "argu', "cut", None, None),
    (CALL, '{"name": ""}', "no_answer", None, None),
    ({**CALL, "strict": True}, call("act", to="left") + "!", "outside", None, ...),
]


@pytest.mark.parametrize(("form", "text", "expected", "thought", "said"), READ)
def test_answers_are_read(form, text, expected, thought, said):
    found = parse(form, text)
    assert (found.action or found.invalid) == expected
    assert (None if found.thought is None else text[slice(*found.thought)]) == thought
    if said is not ...:
        assert (None if found.said is None else text[slice(*found.said)]) == said


def test_every_kind_of_invalid_answer_has_an_example_and_no_other_is_said():
    assert {expected for _, _, expected, *_ in READ} - {word for word in MOVES[0]} == set(INVALID)
    with pytest.raises(ValueError, match="a parser says 'emty'; did you mean 'empty'"):
        Parsed(None, "emty")


def test_the_worked_example_of_the_docstring_is_true():
    assert Tags().parse("<think>ice below</think><answer> left </answer>") == Parsed("left", None, (7, 16), (33, 37))
    assert "(33, 37)" in Parsed.__doc__


def test_several_words_are_one_action():
    for text in ("1 -1", "[1, -1]", "1,-1.", '{"action": [1, -1]}'):
        form = "json" if "{" in text else {"id": "words", "strict": True}
        assert parse(form, text, CELLS).action == "1 -1", text
    assert parse("words", "not 0 0 but\n1, -1 I think", CELLS).action == "1 -1"
    assert parse("words", "1", CELLS).invalid == "unknown_word"
    assert parse({"id": "words", "strict": True}, "1 1 1", CELLS).invalid == "unknown_word"
    formula = (("", "3", "4", "+"),) * 5
    assert parse("tags", "<answer>3 + 4</answer>", formula).action == "3 + 4"
    assert parse("tags", "<answer>3 + 4 + 3 + 4</answer>", formula).invalid == "unknown_word"


@pytest.mark.parametrize("text", ["it is 15", "it is -5", "it is 0.5", "5.5", "x5"])
def test_a_number_is_not_named_by_a_part_of_another_one(text):
    assert parse("words", text, (("5", "7"),)).invalid == "unknown_word"
    assert parse("words", "it is 5.", (("5", "7"),)).action == "5"


def test_words_that_differ_by_capitals_only_are_told_apart():
    assert parse("words", "b", (("a", "A", "B"),)).action == "B"
    assert parse("words", "a", (("a", "A", "B"),)).action == "a"
    assert parse({"id": "words", "strict": True, "ignore_punctuation": False}, "A", (("a", "A", "B"),)).action == "A"


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "{", "}", '"', ":", "[", ","]
PIECES += ['{"action": "left"}', call("act", to="left"), "left", "0 1", " ", "\n", "\\", "<|im_end|>", "\u5de6"]
LEAVES = st.none() | st.booleans() | st.integers() | st.text()
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@pytest.mark.parametrize("words", [(), MOVES, CELLS], ids=["any", "moves", "cells"])
@pytest.mark.parametrize("form", [*FORMS, FREE], ids=str)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_text_at_all_is_parsed(form, words, text):
    if form == FREE and words:
        return
    parser = make_parser(form, words=words)
    found = parser.parse(text)
    assert (found.action is None) == (found.invalid in INVALID)
    for span in (found.thought, found.said):
        assert span is None or 0 <= span[0] <= span[1] <= len(text)
    if found.thought is not None and found.said is not None:
        assert found.thought[1] <= found.said[0]  # one thinks before one speaks
    if found.action is not None:
        assert found.action.strip() == found.action != "" and found.said is not None
        assert not words or parser.vocabulary.read(found.action) is not None
    assert parser.parse(text) == found


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=40, deadline=None)
@given(action=st.sampled_from(MOVES[0]), thought=st.text(max_size=30).filter(lambda text: "<" not in text))
def test_what_is_written_is_read_again(form, action, thought):
    parser = make_parser(form, words=MOVES)
    thought = thought.strip()
    try:
        text = parser.write(action, thought)
    except ValueError as error:
        assert "no room for a thought" in str(error) and thought and parser.strict
        return
    found = parser.parse(text)
    assert found.action == action
    if parser.Config.__name__ != "Json":  # which writes "\\n" for a line break
        seen = "" if found.thought is None else text[slice(*found.thought)]
        assert seen.removesuffix("</a><b>") == thought  # of three tags two are thoughts


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside)))
def test_objects_are_found_as_json_reads_them(value):
    text = f"so {json.dumps({'a': value})} and {json.dumps({'b': value}, indent=1, ensure_ascii=False)}"
    found = find_objects(text)
    assert [one.value for one in found.found] == [{"a": value}, {"b": value}] and not found.cut
    for one in found.found:
        assert json.loads(text[one.start : one.end]) == one.value
        assert all(json.loads(text[m.start : m.end]) == m.value for m in one.members.values())


def test_calls_are_scored_by_names_parameters_and_values():
    expected = [Call("move", {"to": "left", "steps": 2}), Call("look", {})]
    assert agreement(expected, expected) == (1, 2, 2, 5) and agreement(expected, expected).share == 1
    assert agreement(expected[::-1], expected).share == 1  # in any order
    assert agreement([Call("move", {"to": "left", "far": 1})], expected) == (0.5, 1 / 3, 1, 5)
    assert agreement([Call("move", {"to": "left", "steps": True})], [Call("move", {"to": "left", "steps": 1})])[2] == 1
    twice = [Call("move", {"to": "right"}), Call("move", {"to": "left"})]
    assert agreement(twice, twice[::-1]).share == 1  # the best fit, not the first
    assert agreement([], expected).share == 0 and agreement([], []).share == 1
    assert agreement(twice[:1] * 2, twice[:1]).share == 1


def test_calls_are_written_and_read():
    calls = [Call("move", {"to": "\u5de6"}), Call("look", {})]
    assert read_calls(write_calls(calls)) == calls == read_calls(make_parser(FREE).parse(
        "I move.\n" + make_parser(FREE).write(write_calls(calls))
    ).action)  # fmt: skip
    assert read_calls("left") == read_calls('[{"name": 1}]') == []
    with pytest.raises(ValueError, match="is no list of calls"):
        make_parser(FREE).write("left")


@pytest.mark.parametrize(
    ("spec", "words", "message"),
    [
        ("tag", MOVES, "unknown parser 'tag'; did you mean 'tags'"),
        ({"strict": True}, MOVES, "has no id"),
        ({"id": "tags", "strickt": True}, MOVES, "did you mean 'strict'"),
        ({"id": "tags", "tags": []}, MOVES, "expected names without brackets"),
        ({"id": "words", "words": [["a"]]}, MOVES, "parser.words has no effect here"),
        ("tool_call", MOVES, "parser.argument is missing"),
    ],
)
def test_wrong_options_are_refused(spec, words, message):
    with pytest.raises(ValueError, match=message):
        make_parser(spec, words=words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((("a", "a"),), "each once"),
        (((),), "at least one"),
        (((" a", "b"),), "cannot be read"),
        ((("a b",), ("c",)), "neither blanks nor commas"),
    ],
)
def test_words_that_cannot_be_read_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        make_parser("words", words=words).vocabulary  # noqa: B018
    assert make_parser("words", words=(("a b", "c"),)).parse("A B").action == "a b"


def test_a_parser_of_ones_own_derives_from_the_contract():
    @registry.register("parser", "shout")
    class Shout:
        Config = Tags

    try:
        assert isinstance(make_parser("shout"), Parser)
    finally:
        registry._tables["parser"].pop("shout")
