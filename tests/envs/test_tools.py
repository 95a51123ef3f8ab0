"""A calculator beside a problem: calls are answered by messages, whatever else is said is the answer."""

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.experience.demonstrate import make_demonstrator
from embodied_rft.pools.pool import make_pool

ID = "embodied_rft/ToolSum-v0"
SHORT = {"digits": 2, "style": "short", "parser": {"id": "tags", "tags": ["calc"]}}


def talk(replies, seed=3, **options):
    """What is answered to each reply: (message, reward, over, success, calls)."""
    env = gymnasium.make(ID, **options)
    told = [env.reset(seed=seed)[0]["message"]]
    for reply in replies:
        seen, reward, over, _, info = env.step(reply)
        told.append((seen["message"], reward, over, info["is_success"], info["tool_calls"]))
    return told


def test_a_conversation_with_a_calculator():
    first, called, answered = talk(
        ['<tool_call>{"name": "calculator", "arguments": {"expression": "8*(3+4)"}}</tool_call>', "?"]
    )
    assert first.split("\n")[1] == (
        'You may call a calculator up to 2 times: <tool_call>{"name": "calculator", "arguments": {"expression": '
        '"12*(3+4)"}}</tool_call>. What else you reply is the answer.'
    )
    assert called == ("<tool_response>\n56\n</tool_response>", 0, False, 0, 1) and answered[1:] == (0, True, 0, 1)


def test_short_messages_are_the_problem_and_a_number():
    asked, called, answered = talk(["<calc>1/3 + 1</calc>", "12"], **SHORT)
    assert asked[-1] == "=" and asked.count("+") == 1 and called[0] == "4/3"
    assert answered[1] == float(eval(asked[:-1]) == 12)


def test_calls_that_go_wrong_are_told_so_and_count():
    _, *told = talk(["<calc>import os</calc>", "<calc>1+", "<calc>1+1</calc>"], **SHORT)
    assert [one[0] for one in told[:2]] == ["error: no expression of + - * / and brackets", "error: cut"]
    assert [one[4] for one in told] == [1, 2, 2] and told[2][2], "after so many it is the answer"


def test_without_calls_there_is_no_tool():
    asked, answered = talk(["<calc>1+1</calc>"], max_calls=0, **SHORT)
    assert answered[2] and asked == talk([], **SHORT)[0]
    assert talk([], max_calls=0, digits=2)[0] == asked


@pytest.mark.parametrize("options", [{}, {"digits": 3, "num_terms": 3}, SHORT, {**SHORT, "max_calls": 1}])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_demonstrator_calls_and_repeats(options, noise):
    env, demonstrator = gymnasium.make(ID, **options), make_demonstrator(ID, env_options=options, noise=noise)
    rng, won, called = np.random.default_rng(0), [], []
    for seed in range(40):
        message, over = env.reset(seed=seed)[0]["message"], False
        while not over:
            seen, _, over, _, info = env.step(demonstrator.act({"message": (message,)}, rng)[0])
            message = seen["message"]
        won.append(info["is_success"])
        called.append(info["tool_calls"])
    assert (np.array(won) >= called).all()  # whoever guesses may be lucky: 7 + 0
    assert np.mean(called) == 1 if not noise else 0.2 < np.mean(called) < 0.8


def test_the_state_is_exact_in_the_middle_of_a_conversation():
    pools = [make_pool(ID, 3, options=SHORT) for _ in range(2)]
    seen = pools[0].reset(np.arange(3))
    pools[0].step(["<calc>7*8</calc>", "<calc>", "1"])
    pools[1].reset(np.arange(5, 8))
    pools[1].set_state(pools[0].get_state())
    first, second = (pool.step(["<calc>1+1</calc>", "2", "3"]) for pool in pools)
    assert first.observation == second.observation and (first.reward == second.reward).all()
    assert seen["message"][0] != first.observation["message"][0] == "2"
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_calls": -1}, "max_calls is -1; expected at least 0"),
        ({"style": "shrt"}, "did you mean 'short'"),
        ({"parser": "tag"}, "did you mean 'tags'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make(ID, **options)
