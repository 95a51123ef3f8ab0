"""Environments as conversations: messages, answers, costs, pictures, states, exactness, and who demonstrates them."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.serving import BatchVectorEnv
from embodied_rft.envs.turns.hosts import BatchHost, SinglesHost
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.demonstrate import demonstrator_act, make_demonstrator
from embodied_rft.pools.pool import make_pool
from embodied_rft.testing.check_env import check_env
from embodied_rft.turns.parsing import INVALID

GAMES = sorted(id for id in gymnasium.registry if id.startswith("embodied_rft/Told") and id != "embodied_rft/Told-v0")
ANY = "embodied_rft/Told-v0"
LAKE = "embodied_rft/ToldFrozenLake-v0"


def vector(id, count=2, **options):
    return gymnasium.make_vec(id, num_envs=count, **options)


def say(word):
    return f"<answer>{word}</answer>"


def test_a_conversation_in_full():
    env = vector("embodied_rft/ToldNumberLine-v0", 1, invalid=-0.5)
    seen, _ = env.reset(seed=3)
    rules, how, *state = seen["message"][0].split("\n")
    assert rules.startswith("You are on a number line from 0 to 5.")
    assert how == "Answer like <think>...</think><answer>left</answer>. Actions: left, right."
    assert state == ["Target: 3", "Current: 0", "Legal: right"]
    seen, reward, *_ = env.step([f"<think>up</think>{say('Right.')}"])
    assert seen["message"] == ("Target: 3\nCurrent: 1",) and reward == [0]
    seen, reward, _, _, info = env.step(["right"])
    assert seen["message"][0].split("\n")[0] == f"Your answer was not understood: no answer. {how}"
    assert seen["message"][0].endswith("Target: 3\nCurrent: 1")  # nothing moved
    assert reward == [-0.5] and info["invalid/no_answer"] == [1] and info["invalid/empty"] == [0]
    seen, reward, terminated, _, info = env.step([say("right")])
    assert seen["message"] == ("Target: 3\nCurrent: 2",) and not terminated and info["invalid/no_answer"] == [1]
    _, reward, terminated, _, info = env.step([say("right")])
    assert terminated == [True] and reward == [1] and info["is_success"] == [1]


@pytest.mark.parametrize("id", ["FrozenLake", "NumberLine", "EZPoints"])
def test_short_messages_are_short(id):
    env = vector(f"embodied_rft/Told{id}-v0", 64, style="short", parser={"id": "words", "strict": True})
    seen = list(env.reset(seed=0)[0]["message"])
    words, draw = env.batch.words[0], np.random.default_rng(0)
    for _ in range(12):
        seen += env.step([str(word) for word in draw.choice(words, 64)])[0]["message"]
    assert max(map(len, seen)) < 60 and min(map(len, seen)) > 0


@pytest.mark.parametrize("id", GAMES)
def test_a_lifted_game_is_the_game(id):
    """The same seeds and actions: the same rewards, ends, symbols and pictures, and no more random numbers."""
    plain = vector(id.replace("Told", ""), 3, observation="both")
    told = vector(id, 3, state=True, observe="both", told=True)
    assert isinstance(told.batch.host, BatchHost)
    (a, _), (b, _) = plain.reset(seed=5), told.reset(seed=5)
    plain.single_action_space.seed(0)
    for _ in range(40):
        assert np.array_equal(a["image"], b["image"]) and np.array_equal(a["state"], b["state"])
        actions = [plain.single_action_space.sample() for _ in range(3)]
        texts = [say(told.batch.vocabulary.say(np.atleast_1d(action))) for action in actions]
        a, *first, _ = plain.step(np.array(actions))
        b, *second, info = told.step(texts)
        assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
        assert not any(info[f"invalid/{kind}"].any() for kind in INVALID if f"invalid/{kind}" in info)
        assert all(state in message for state, message in zip(b["told"], b["message"], strict=True))


@pytest.mark.parametrize(
    ("id", "options", "words", "shape"),
    [
        ("CartPole-v1", {}, (("0", "1"),), (4,)),
        ("FrozenLake-v1", {"is_slippery": False}, (("0", "1", "2", "3"),), ()),
        ("Pendulum-v1", {}, (("-2", "-1", "0", "1", "2"),), (3,)),
        ("embodied_rft/FetchReach-v0", {}, (("-1", "-0.5", "0", "0.5", "1"),) * 4, (16,)),
    ],
)
def test_any_environment_is_lifted(id, options, words, shape):
    env = gymnasium.make(ANY, of=id, options=options, state=True)
    plain = gymnasium.make(id, **options)
    assert env.unwrapped.batch.words == words and env.observation_space["state"].shape == shape
    env.reset(seed=3), plain.reset(seed=3)
    for _ in range(3):
        answer = " ".join(choice[1] for choice in words)
        action = plain.action_space.sample()
        if isinstance(plain.action_space, spaces.Box):
            action = np.array([float(word) for word in answer.split()], np.float32)
        else:
            action = 1
        seen, reward, *_ = env.step(say(answer))
        expected, paid, *_ = plain.step(action)
        assert reward == pytest.approx(paid)
        parts = [expected[key] for key in sorted(expected)] if isinstance(expected, dict) else [np.atleast_1d(expected)]
        numbers = np.concatenate(parts)
        assert np.allclose(seen["state"], numbers)
        assert seen["message"].split()[-1] == f"{float(np.ravel(numbers)[-1]):.3g}"


def test_environments_name_their_actions():
    minigrid = gymnasium.make(ANY, of="MiniGrid-Empty-5x5-v0", observe="both").unwrapped.batch
    assert minigrid.words == (("left", "right", "forward", "pickup", "drop", "toggle", "done"),)
    assert minigrid.messages == [""] and isinstance(minigrid.host, SinglesHost)
    cart = gymnasium.make(ANY, of="CartPole-v1", words=["left", "right"])
    assert "Actions: left, right." in cart.reset(seed=0)[0]["message"]
    assert cart.step(say("RIGHT"))[1] == 1


def test_numbers_in_columns():
    env = gymnasium.make(ANY, of="CartPole-v1", words=["left", "right"], style="short", decimals=2)
    assert env.reset(seed=3)[0]["message"] == "-0.04 -0.03 +0.03 +0.01"


def test_pictures_beside_or_instead_of_text():
    both, image = vector(LAKE, observe="both"), vector(LAKE, observe="image")
    a, b = both.reset(seed=0)[0], image.reset(seed=0)[0]
    assert np.array_equal(a["image"], b["image"]) and a["image"].shape == (2, 64, 64, 3)
    assert "P___" in a["message"][0] and "P___" not in b["message"][0] and "Answer like" in b["message"][0]
    before = b["image"].copy()
    c = image.step([say("right"), "nothing"])[0]
    assert c["message"][0] == "" and c["message"][1].startswith("Your answer was not understood: no answer")
    assert not np.array_equal(c["image"][0], b["image"][0]) and np.array_equal(c["image"][1], b["image"][1])
    assert np.array_equal(b["image"], before)  # what was given away stays
    cart = gymnasium.make(ANY, of="CartPole-v1", observe="image", style="short")
    assert cart.reset(seed=0)[0]["message"] == "" and cart.observation_space["image"].shape == (400, 600, 3)


def test_what_is_done_instead_of_an_answer_that_is_not_understood():
    passed, pushed = vector(LAKE, 1), vector(LAKE, 1, instead="right", invalid=-1.0)
    passed.reset(seed=3), pushed.reset(seed=3)
    assert passed.step([""])[0]["message"][0].split("\n")[1].startswith("P")
    seen, reward, *_, info = pushed.step([""])
    assert seen["message"][0].split("\n")[1].startswith("_P") and reward == [-1] and info["invalid/empty"] == [1]


def test_turns_that_are_not_understood_count():
    env = vector(LAKE, 1, max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(["hm"])[3].item() for _ in range(3)] == [False, False, True]
    short = gymnasium.make(LAKE, turns=2)
    short.reset(seed=0)
    assert [short.step("hm")[3] for _ in range(2)] == [False, True]
    inner = gymnasium.make(ANY, of="CartPole-v1", wrap=[{"id": "TimeLimit", "max_episode_steps": 2}])
    inner.reset(seed=0)
    assert [inner.step(say(0))[3] for _ in range(2)] == [False, True]  # the inner clock is heard


def test_who_is_never_understood_fails_where_success_is_told():
    game, silent = vector(LAKE, 2), vector(ANY, 2, of="CartPole-v1")
    game.reset(seed=0), silent.reset(seed=0)
    assert game.step(["hm", ""])[4]["is_success"].tolist() == [False, False]
    assert "is_success" in silent.step(["hm", "hm"])[4]  # not known yet
    silent.step([say(0), "hm"])
    assert "is_success" not in silent.step(["hm", "hm"])[4]


@pytest.mark.parametrize("of", ["CartPole-v1", "MiniGrid-Empty-5x5-v0"])
def test_an_agent_that_is_never_understood_comes_to_an_end(of):
    env = gymnasium.make(ANY, of=of, observe="both")
    env.reset(seed=0)
    limit = 500 if of == "CartPole-v1" else 100  # what it is registered with, or so many in a row
    ends = [env.step("hm")[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]


@pytest.mark.parametrize("id", [LAKE, "embodied_rft/ToldSokoban-v0"])
@pytest.mark.parametrize("kind", ["native", "sync"])
def test_a_saved_conversation_goes_on_bit_by_bit(id, kind):
    def play(pool, steps):
        seen = []
        for _ in range(steps):
            result = pool.step(
                [say(words[draw.integers(len(words))]) if draw.random() < 0.8 else "?" for _ in range(3)]
            )
            seen.append((result.observation, result.reward.tolist(), result.terminated.tolist()))
            over = result.terminated | result.truncated
            if over.any():
                seen.append(pool.reset(np.arange(3) + len(seen), over))
        return seen

    words = ["left", "right", "up", "down"]
    pool, other = (make_pool(id, 3, kind=kind, options={"observe": "both"}) for _ in range(2))
    draw = np.random.default_rng(0)
    pool.reset(np.arange(3))
    play(pool, 5)
    state, rng = pool.get_state(), draw.bit_generator.state
    first = play(pool, 12)
    other.reset(np.arange(3) + 9)
    other.set_state(state)
    draw.bit_generator.state = rng
    assert repr(first) == repr(play(other, 12))
    assert np.array_equal(pool.observation["image"], other.observation["image"])


def test_what_cannot_be_saved_says_so():
    pool = make_pool(ANY, 2, options={"of": "CartPole-v1"})
    pool.reset(np.arange(2))
    assert not pool.can_save and pool.get_state() is None
    assert make_pool(ANY, 2, options={"of": "embodied_rft/Swap-v0"}).can_save


@pytest.mark.parametrize("id", GAMES)
@pytest.mark.parametrize("parser", ["tags", {"id": "tool_call", "tool": "play", "argument": "at"}], ids=str)
def test_players_of_games_speak(id, parser):
    options = {"state": True, "told": True, "parser": parser}
    pool = make_pool(id, 8, options=options)
    player = make_demonstrator(id, env_options=options, thought="state")
    act, plain = demonstrator_act(player, np.random.default_rng(0)), make_demonstrator(id.replace("Told", ""))
    observation = pool.reset(np.arange(8))
    for _ in range(3):
        replies = act(observation).action
        numbers = plain.act({"state": observation["state"]}, np.random.default_rng(0))
        for reply, told, number in zip(replies, observation["told"], numbers, strict=True):
            parsed = player.lifted.parser.parse(reply)
            assert player.lifted.vocabulary.read(parsed.action) == tuple(np.atleast_1d(number))
            assert reply[slice(*parsed.thought)] == told.strip()
        result = pool.step(replies)
        over = result.terminated | result.truncated
        observation = pool.reset(np.arange(8) + 8, over) if over.any() else result.observation


@pytest.mark.parametrize("id", [LAKE, "embodied_rft/ToldNumberLine-v0", "embodied_rft/ToldEZPoints-v0"])
def test_demonstrations_of_lifted_games_succeed(id):
    options = {"state": True, "style": "short", "parser": {"id": "words", "strict": True}}
    pool = make_pool(id, 8, options=options)
    act = demonstrator_act(make_demonstrator(id, env_options=options), np.random.default_rng(0))
    assert np.mean(Collector(pool, run_seed=0).collect(act, episodes=16).successes) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "embodied_rft/FrozenLak-v0"}, "did you mean 'embodied_rft/FrozenLake-v0'"),
        ({"of": "embodied_rft/TextSum-v0"}, "reads answers itself"),
        ({"of": LAKE}, "reads answers itself"),
        ({"of": "CartPole-v1", "words": ["left"]}, "as many as there are actions"),
        ({"of": "CartPole-v1", "bins": 3}, "bins have no effect"),
        ({"of": "CartPole-v1", "turns": 501}, "turns is 501; expected 1 to 500"),
        ({"of": "CartPole-v1", "turns": 0}, "turns is 0"),
        ({"of": "Pendulum-v1", "bins": 1}, "bins is 1"),
        ({"of": "Pendulum-v1", "digits": 2, "decimals": 2}, "digits have no effect beside decimals"),
        ({"of": "Pendulum-v1", "decimals": -1}, "decimals -1; expected at least 0"),
        ({"of": "embodied_rft/NumberLine-v0", "decimals": 1}, "digits and decimals have no effect where no numbers"),
        ({"of": "CartPole-v1", "instead": "up"}, "instead is 'up', which is no action"),
        ({"of": "CartPole-v1", "observe": "pictures"}, "observe is 'pictures'"),
        ({"of": "CartPole-v1", "style": "shrt"}, "did you mean 'short'"),
        ({"of": "CartPole-v1", "style": "short", "rules": "Stand."}, "rules have no effect"),
        ({"of": "CartPole-v1", "parser": {"id": "tag"}}, "did you mean 'tags'"),
        ({"of": "embodied_rft/FrozenLake-v0", "wrap": [{"id": "TimeLimit"}]}, "wrap has no effect"),
        (
            {"of": "embodied_rft/FrozenLake-v0", "options": {"observation": "state"}},
            "options.observation has no effect",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make(ANY, **options).reset(seed=0)


def test_players_say_what_they_need():
    pool = make_pool(LAKE, 1)
    with pytest.raises(ValueError, match=r"set env.options.state to true"):
        make_demonstrator(LAKE).act(pool.reset(np.arange(1)), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"set env.options.told to true"):
        make_demonstrator(LAKE, thought="state").act({"state": np.zeros((1, 16))}, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no scripted demonstrator for 'Acrobot-v1', which is lifted"):
        make_demonstrator(ANY, env_options={"of": "Acrobot-v1"})


def test_a_lifted_environment_passes_the_check():
    check_env(LAKE, options={"observe": "both", "state": True})
    check_env(ANY, options={"of": "CartPole-v1"})


def test_it_is_a_batch_of_ours():
    assert isinstance(vector(LAKE), BatchVectorEnv)
