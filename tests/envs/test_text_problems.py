"""What a line of a problem file may hold: chats, columns for rules, rules of third parties, patterns that never end."""

import json

import gymnasium
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import embodied_rft.envs  # noqa: F401
from embodied_rft import registry
from embodied_rft.envs.text.rules import make_rule
from embodied_rft.learning.agent import build_agent
from embodied_rft.pools.text_spaces import ChatText, read_chat, write_chat
from embodied_rft.registry import register

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And\N{LATIN SMALL LETTER U WITH DIAERESIS} 3?"},
]


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setitem(registry._tables, "reward", dict(registry._tables["reward"]))
    registry.known("reward")


def write(folder, *lines):
    path = folder / "problems.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def make(path, **options):
    return gymnasium.make("embodied_rft/TextJsonl-v0", path=path, held_out=0, **options)


def test_a_rule_sees_prompt_reply_answer_columns_and_its_options(tmp_path, rules):
    seen = []

    @register("reward", "spy")
    def spy(reply, answer, *, prompt, columns, factor=1.0):
        seen.append((reply, answer, prompt, columns))
        return factor * columns["worth"]

    line = {"answer": 3, "worth": 0.5, "source": ["a", {"b": 1}], "checker": {"id": "spy", "factor": 0.5}}
    for prompt in ("three?", CHAT):
        env = make(write(tmp_path, {"prompt": prompt, **line}))
        env.reset(seed=0)
        assert env.step("well")[1] == 0.25
        assert seen[-1] == ("well", "3", prompt, {"worth": 0.5, "source": ["a", {"b": 1}]})


def test_rules_inside_a_format_see_the_columns_too(tmp_path, rules):
    @register("reward", "column")
    def column(reply, answer, *, columns):
        return float(reply == columns["word"])

    checker = {"id": "format", "tags": ["say"], "rule": "column"}
    env = make(write(tmp_path, {"prompt": "?", "answer": "", "word": "yes", "checker": checker}))
    env.reset(seed=0)
    assert env.step("<say>yes</say>")[1] == 1.0


@pytest.mark.parametrize("given", [None, "much", float("nan"), float("inf"), [1.0, 2.0]])
def test_a_rule_that_gives_no_number_is_named_with_its_line(tmp_path, rules, given):
    @register("reward", "odd")
    def odd(reply, answer):
        return given

    path = write(tmp_path, {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b", "checker": "odd"})
    with pytest.raises(ValueError, match=r"problems.jsonl, line 2: rule 'odd' gave the reward .*; expected a finite"):
        make(path)


def test_a_column_that_the_rule_misses_is_found_before_a_run(tmp_path, rules):
    @register("reward", "picky")
    def picky(reply, answer, *, columns):
        return float(columns["level"] in reply)

    with pytest.raises(ValueError, match=r"line 1: its rule fails on it: KeyError: 'level'"):
        make(write(tmp_path, {"prompt": "a", "answer": "b", "checker": "picky"}))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "is no chat"),
        ([{"role": "user"}], "message 1 is"),
        ([{"role": "user", "content": "a", "name": "b"}], "no more"),
        ([{"role": "user", "content": ["a"]}], "must be texts"),
        ([{"role": "", "content": "a"}], "the role not empty"),
        (["a"], "message 1 is 'a'"),
        ([*CHAT, {"role": "assistant", "content": "7"}], "the last message is the assistant's"),
        ({"role": "user", "content": "a"}, "the prompt is"),
        (7, "the prompt is 7"),
    ],
)
def test_bad_chats_are_named_with_their_line(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=f"problems.jsonl, line 2: .*{message}"):
        make(write(tmp_path, {"prompt": "a", "answer": "b"}, {"prompt": prompt, "answer": "b"}))


@pytest.mark.filterwarnings("ignore:.*render")
def test_a_chat_reaches_the_model_through_its_template(tmp_path):
    path = write(tmp_path, {"prompt": CHAT, "answer": "5"}, {"prompt": "plain", "answer": "5"})
    env = make(path)
    check_env(env.unwrapped)
    space = env.observation_space["prompt"]
    assert isinstance(space, ChatText) and space.contains(space.sample()) and not space.contains("plain")
    spec = {"id": "language", "model": {"tiny": {"hidden_size": 32}}, "max_new_tokens": 4}
    rng = torch.Generator().manual_seed(0)
    spaces = (env.observation_space, env.action_space, rng)
    for options in ({}, {"system": "Be kind."}):
        policy = build_agent({**spec, **options}, *spaces).policy
        kind = [{"role": "system", "content": options["system"]}] if options else []
        for chat, expected in ((CHAT, CHAT), ([{"role": "user", "content": "plain"}],) * 2):
            expected = expected if expected[0]["role"] == "system" else [*kind, *expected]
            ids = policy.prompt_ids({"prompt": [write_chat(chat)]}).row(0)
            template = policy.tokenizer.apply_chat_template(expected, add_generation_prompt=True, tokenize=False)
            assert policy.tokenizer.decode(ids.tolist()) == template
    shown = {env.reset(seed=seed)[0]["prompt"] for seed in range(20)}
    assert {len(read_chat(text)) for text in shown} == {1, 4}
    assert len(policy.act({"prompt": sorted(shown)}, greedy=True).action) == 2
    with pytest.raises(ValueError, match='use prompt "chat"'):
        build_agent({**spec, "prompt": "plain"}, *spaces)


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(a+)+b", "(a*)*c|(a|a)+d", "a*a*a*a*a*a*a*b"])
def test_patterns_that_never_end_do_not_match(pattern):
    judge = make_rule("regex")  # by themselves they would try for years
    assert judge("a" * 200 + "!", pattern) == 0.0 and judge("a" * 3000 + "!", pattern) == 0.0
    assert judge("aaaab" if "b" in pattern else "aaaa" if "$" in pattern else "aac", pattern) == 1.0


def test_names_of_problems_that_nobody_shows(tmp_path):
    path = write(tmp_path, *({"prompt": f"say {i}", "answer": "b"} for i in range(3)))
    env = make(path, exclude=["problems.jsonl, line 2"])
    assert {env.reset(seed=seed)[0]["prompt"] for seed in range(30)} == {"say 0", "say 2"}
    with pytest.raises(ValueError, match="'line 2', which is no problem"):
        make(path, exclude=["line 2"])
    with pytest.raises(ValueError, match="take it out"):
        gymnasium.make("embodied_rft/TextCountdown-v0", exclude=["a"])
