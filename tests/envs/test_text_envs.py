"""Text environments: rules against known answers, seeds, both forms equal, exact state, bad problem files."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.text import rules as rules
from embodied_rft.pools.pool import make_pool
from embodied_rft.registry import known
from embodied_rft.seeding import evaluation_seed

IDS = ("embodied_rft/TextSum-v0", "embodied_rft/TextCountdown-v0", "embodied_rft/TextFormat-v0")
GO = '{"name": "go", "arguments": {"to": 3}}'
ANSWER = {
    "embodied_rft/TextSum-v0": lambda prompt: str(sum(map(int, prompt.rstrip("=").split("+")))),
    "embodied_rft/TextFormat-v0": lambda prompt: formatted(prompt),
}


def formatted(prompt):
    """Follows the instruction of TextFormat, from its words alone."""
    words = prompt.replace(",", "").split()
    item = {"lower-case": "ab", "upper-case": "AB", "numbers": "12"}[words[3]]
    separator = {"commas": ",", "semicolons": ";", "dashes": "-"}[words[words.index("by") + 1]]
    return separator.join([item] * int(words[2]))


@pytest.mark.parametrize(
    ("rule", "reply", "answer", "reward"),
    [
        ("exact", " seven  apples ", "seven apples", 1),
        ("exact", "Seven", "seven", 0),
        ({"id": "exact", "ignore_case": True}, "Seven", "seven", 1),
        ("numeric", "3 and 4 make 7", "7", 1),
        ("numeric", "It is 7. No, 8", "7", 0),
        ("numeric", "1,250.50", "1250.5", 1),
        ("numeric", r"so \boxed{-3/4} it is, 100 %", "-0.75", 1),
        ("numeric", "no idea", "7", 0),
        ("numeric", "1/0", "7", 0),
        ("numeric", "1.5/2", "0.75", 1),
        ("numeric", r"\boxed{-\frac{1}{2}}", "-0.5", 1),
        ("numeric", "\N{MINUS SIGN}5", "-5", 1),
        ("numeric", "10-3", "3", 1),
        ("numeric", "1,2,3", "3", 1),
        ("numeric", "1e999999999", "7", 0),  # written out it would fill the memory
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("json", '{"a": [1.0, {"b": null}]}', '{"a": [1, {"b": null}]}', 1),
        ({"id": "numeric", "tolerance": 0.01}, "3.141", "3.1416", 1),
        ({"id": "numeric", "tolerance": 0.01, "relative": True}, "102", "100", 0),
        ("regex", "ab,cd\n", "[a-z]+,[a-z]+", 1),
        ("regex", "ab,cd!", "[a-z]+,[a-z]+", 0),
        ("contains", "The cat sat.", "cat", 1),
        ("contains", "The cathedral.", "cat", 0),
        ("format", "<think>a</think>\n<answer>7</answer>", "7", 1),
        ("format", "<answer>7</answer><think>a</think>", "7", 0),
        ("format", "<think>a</think><answer>1</answer><answer>7</answer>", "7", 0),
        ({"id": "format", "rule": "numeric"}, "<think>a</think><answer>8</answer>", "7", 0.5),
        ({"id": "format", "rule": "numeric"}, "<think>a</think><answer>7</answer>", "7", 1),
        ("json", '{"a": 1, "b": [2]}', '{"b": [2]}', 1),
        ("json", '{"a": 1}', '{"b": null}', 0),
        ("json", "{", "{}", 0),
        ("calls", f"so <tool_call>{GO}</tool_call>", GO, 1),
        ("calls", GO, f"[{GO}]", 1),
        ("calls", GO.replace("3", "4"), GO, (1 + 6 * 2 / 3) / 7),  # tool and parameter are right
        ("calls", GO.replace("to", "at"), GO, (1 + 6 * 1 / 3) / 7),
        ("calls", GO.replace("go", "run"), GO, 1 / 7),
        ("calls", f"{GO} {GO}", GO, (1 + 6 * 0.99) / 7),  # once too often
        ("calls", "go to 3", GO, 0),
        ({"id": "calls", "graded": False}, GO.replace("3", "4"), GO, 0),
        ({"id": "calls", "graded": False}, GO, GO, 1),
        ("countdown", "(3+7)/2 = 5", '{"numbers": [2, 3, 7], "target": 5}', 1),
        ("countdown", "3+3", '{"numbers": [3, 7], "target": 6}', 0),
        ("countdown", "6", '{"numbers": [3, 7], "target": 6}', 0),
        ("countdown", "3**7", '{"numbers": [3, 7], "target": 2187}', 0),
        ("countdown", "__import__('os')", '{"numbers": [3], "target": 3}', 0),
        ("countdown", "1/0", '{"numbers": [1], "target": 0}', 0),
        ("countdown", "(" * 150 + "3", '{"numbers": [3], "target": 3}', 0),
    ],
)
def test_rules(rule, reply, answer, reward):
    assert rules.make_rule(rule)(reply, answer) == reward


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_numbers_are_read_exactly(number, decimals):
    text = f"the answer is {number:,}.{'0' * decimals}" if decimals else f"the answer is {number:,}"
    assert rules.last_number(text) == number


@given(st.lists(st.integers(0, 200), min_size=1), st.integers(1, 50), st.integers(0, 50))
def test_overlong_penalty_falls_from_0_to_minus_1(lengths, margin, more):
    limit = margin + more
    penalty = rules.overlong_penalty(sorted(lengths), limit=limit, margin=margin)
    assert (np.diff(penalty) <= 0).all() and penalty.min() >= -1 and penalty.max() <= 0
    assert rules.overlong_penalty([limit - margin, limit], limit=limit, margin=margin).tolist() == [0, -1]
    with pytest.raises(ValueError, match="margin"):
        rules.overlong_penalty([1], limit=limit, margin=limit + 1)


def test_unknown_rules_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'numeric'"):
        rules.make_rule("numerics")
    with pytest.raises(ValueError, match="did you mean 'tolerance'"):
        rules.make_rule({"id": "numeric", "tolerence": 1})
    with pytest.raises(ValueError, match="names no rule"):
        rules.make_rule({"tolerance": 1})
    assert {"exact", "numeric", "regex", "format", "contains", "json", "countdown"} <= set(known("reward"))


@pytest.mark.filterwarnings("ignore:.*render")
@pytest.mark.parametrize("id", IDS)
def test_gymnasium_accepts_them(id):
    check_env(gymnasium.make(id).unwrapped)


@pytest.mark.parametrize("id", IDS)
def test_a_seed_is_a_problem_in_every_form(id):
    seeds = np.array([5, 6, 5, evaluation_seed(0) - 2**31])
    single = gymnasium.make(id)
    shown = [single.reset(seed=int(seed))[0]["prompt"] for seed in seeds]
    assert shown[0] == shown[2] and len(set(shown)) == 3
    replies = ["7", ANSWER[id](shown[1]) if id in ANSWER else "1", "3", "x"]
    for kind in ("native", "sync"):
        pool = make_pool(id, 4, kind=kind)
        assert pool.reset(seeds)["prompt"] == shown
        first = pool.step(replies)
        assert first.terminated.all() and not first.truncated.any() and first.valid.all()
        expected = []
        for seed, reply in zip(seeds, replies, strict=True):
            single.reset(seed=int(seed))
            expected.append(single.step(reply))
        assert first.reward.tolist() == [e[1] for e in expected]
        assert first.info["success"].tolist() == [bool(e[4]["is_success"]) for e in expected]
        mask = np.array([False, True, False, True])
        again = pool.reset(seeds[::-1].copy(), mask)["prompt"]
        assert again == [shown[0], shown[2], shown[2], shown[0]]
        pool.close()


@pytest.mark.parametrize("id", ANSWER)
def test_right_answers_are_rewarded_and_wrong_ones_are_not(id):
    env = gymnasium.make(id)
    for seed in range(20):
        prompt = env.reset(seed=seed)[0]["prompt"]
        right = ANSWER[id](prompt)
        assert env.step(right)[1] == 1.0
        env.reset(seed=seed)
        assert env.step(right + "1;")[1] == 0.0


def test_every_countdown_has_a_solution():
    import itertools

    env = gymnasium.make("embodied_rft/TextCountdown-v0", num_numbers=3, largest=9)
    for seed in range(15):
        env.reset(seed=seed)
        task = json.loads(env.unwrapped.batch.problems[0].answer)
        assert any(
            rules.countdown(form.format(*numbers, *signs), env.unwrapped.batch.problems[0].answer)
            for numbers in itertools.permutations(task["numbers"])
            for signs in itertools.product("+-*", repeat=2)
            for form in ("({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})")
        )


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_state_is_exact(kind):
    def fresh():
        return make_pool("embodied_rft/TextCountdown-v0", 3, kind=kind)

    pool = fresh()
    pool.reset(np.array([1, 2, 3]))
    state = pool.get_state()
    other = fresh()
    other.reset(np.array([7, 8, 9]))
    other.set_state(state)
    a, b = pool.step(["1"] * 3), other.step(["1"] * 3)
    assert a.observation == b.observation and (a.reward == b.reward).all()

    # Without new seeds the generators go on; they must go on alike.
    def draw(p):
        if kind == "sync":
            return [slot.env.reset()[0]["prompt"] for slot in p.host.slots]
        return p.host.vector_env.reset(options={"reset_mask": np.ones(3, bool)})[0]["prompt"]

    again = [draw(p) for p in (pool, other)]
    assert tuple(again[0]) == tuple(again[1])


def test_overlong_replies_cost():
    env = gymnasium.make("embodied_rft/TextSum-v0", overlong=(20, 10))
    prompt = env.reset(seed=1)[0]["prompt"]
    right = ANSWER["embodied_rft/TextSum-v0"](prompt)
    _, reward, _, _, info = env.step("x" * (15 - len(right) - 1) + " " + right)
    assert reward == 0.5 and info["is_success"] == 1.0


def test_bad_actions():
    env = gymnasium.make("embodied_rft/TextSum-v0").unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("7")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected a list of 1 strings"):
        env.step(7)


def test_jsonl(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [{"prompt": "2+2=", "answer": 4, "checker": "numeric"}, {"prompt": "Say yes", "answer": "yes"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    rule = {"id": "exact", "ignore_case": True}
    env = gymnasium.make("embodied_rft/TextJsonl-v0", path=str(path), checker=rule, held_out=0)
    seen = set()
    for seed in range(20):
        prompt = env.reset(seed=seed)[0]["prompt"]
        seen.add(prompt)
        assert env.step("four is 4" if prompt == "2+2=" else "YES")[1] == 1.0
    assert seen == {"2+2=", "Say yes"}
    separated = json.dumps({"prompt": "one\N{LINE SEPARATOR}two", "answer": "3"}, ensure_ascii=False)
    path.write_text(f"\N{BYTE ORDER MARK}{separated}\r\n", encoding="utf-8")  # as some editors and data sets write it
    env = gymnasium.make("embodied_rft/TextJsonl-v0", path=str(path), held_out=0)
    assert env.reset(seed=0)[0]["prompt"] == "one\N{LINE SEPARATOR}two"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problem"),
        ("\n \n", "holds no problem"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"', "line 2: this is not JSON"),
        ('\n\n{"prompt": "a"}', "line 3: no key 'answer'"),
        ('["a"]', "line 1: expected an object"),
        ('{"prompt": "", "answer": "b"}', "line 1: the prompt is ''"),
        ('{"prompt": "a", "answer": ["b"]}', "line 1: the answer is"),
        ('{"prompt": "a", "answer": "b", "cheker": "exact"}', "line 1: unknown key 'cheker'"),
        ('{"prompt": "a", "answer": "b", "checker": "exakt"}', "line 1: unknown reward 'exakt'; did you mean 'exact'"),
        ('{"prompt": "a", "answer": "b", "checker": "numeric"}', "line 1: the answer 'b' is no number"),
        ('{"prompt": "a", "answer": "(", "checker": "regex"}', "line 1: the answer '\\(' is no pattern"),
        ('{"prompt": "a", "answer": "b", "checker": "json"}', "line 1: the answer 'b' is no JSON object"),
        ('{"prompt": "a", "answer": "{}", "checker": "countdown"}', "line 1: the answer '{}' is no problem"),
        ('{"prompt": "a", "answer": "b", "checker": {"id": "format", "rule": "numeric"}}', "line 1: .*is no number"),
        ('{"prompt": "a", "answer": "b", "checker": {"id": "format", "rule": "numerik"}}', "did you mean 'numeric'"),
    ],
)
def test_bad_problem_files(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        gymnasium.make("embodied_rft/TextJsonl-v0", path=str(path))


def shown(env, seeds):
    return {env.reset(seed=int(seed))[0]["prompt"] for seed in seeds}


def test_evaluation_seeds_alone_show_the_held_out_prompts(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": i}) + "\n" for i in range(200)))
    env = gymnasium.make("embodied_rft/TextJsonl-v0", path=str(path))
    training, evaluation = shown(env, range(2_000)), shown(env, range(2**31, 2**31 + 400))
    assert len(training) + len(evaluation) == 200 and not training & evaluation
    assert 10 <= len(evaluation) <= 32  # a tenth, by their hashes
    env = gymnasium.make("embodied_rft/TextJsonl-v0", path=str(path), held_out=0)
    assert shown(env, range(2_000)) == training | evaluation
    sums = gymnasium.make("embodied_rft/TextSum-v0", held_out=0.3)
    assert not shown(sums, range(500)) & shown(sums, range(2**31, 2**31 + 500))
    turns = [next(iter(shown(sums, [seed]))) for first in range(200) for seed in (2**31 + first, first)]  # in turn
    assert not set(turns[::2]) & set(turns[1::2])


def test_a_batch_keeps_its_sides_through_resets_and_restores():
    env = gymnasium.make_vec("embodied_rft/TextSum-v0", num_envs=2, held_out=0.3)
    env.reset(seed=[5, 2**31 + 5])
    state, seen = env.unwrapped.get_state(), []
    for _ in range(2):
        prompts = []
        for _ in range(60):  # a step with a reply, then one that shows the next problem
            prompts.append(env.step(("1", "1"))[0]["prompt"])
        seen.append(prompts)
        env.unwrapped.set_state(state)
    assert seen[0] == seen[1]
    assert not {p[0] for p in seen[0]} & {p[1] for p in seen[0]}


@pytest.mark.parametrize("share, message", [(1.0, "below 1"), (-0.1, "at least 0"), (1e-9, "no prompt is held out")])
def test_impossible_shares_are_refused(share, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make("embodied_rft/TextSum-v0", held_out=share).reset(seed=2**31)


def test_missing_problem_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        gymnasium.make("embodied_rft/TextJsonl-v0", path=str(tmp_path / "none.jsonl"))
