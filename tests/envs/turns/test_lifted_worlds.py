"""Worlds of other packages as conversations, told by themselves and by experts; numbers and texts as answers."""

import gymnasium
import numpy as np
import pytest

from embodied_rft.experience.collect import Collector
from embodied_rft.experience.demonstrate import demonstrator_act, make_demonstrator
from embodied_rft.pools.pool import make_pool
from tests.lab.worlds import PACKAGES

ANY = "embodied_rft/Told-v0"
LEVEL = {"level": "GoToObj-v0", "observation": "state"}
STRICT = {"id": "words", "strict": True}


def lifted(of, **options):
    pytest.importorskip(PACKAGES[of])
    return gymnasium.make(ANY, of=f"embodied_rft/{of}-v0", **options)


def say(word):
    return f"<answer>{word}</answer>"


def test_a_mission_in_full_and_in_short():
    full, short = (lifted("BabyAI", options=LEVEL, style=style, state=True) for style in ("full", "short"))
    rules, how, *state = full.reset(seed=3)[0]["message"].split("\n")
    assert rules.startswith("You are in a world of squares")
    assert how.endswith("Actions: turn left, turn right, go forward, pick up, drop, toggle, done.")
    assert state == ["Mission: go to the yellow box", "You carry nothing.",
                     "You see a wall 5 steps forward, a wall 1 step left."]  # fmt: skip
    assert short.reset(seed=3)[0]["message"] == "go to the yellow box\nwall 5f 1l"
    seen = short.step(say("turn right"))[0]
    assert seen["message"].split("\n")[1] == "wall 6f 2r, yellow box 5f2l"
    world = gymnasium.make("embodied_rft/BabyAI-v0", **LEVEL)
    world.reset(seed=3)
    assert np.array_equal(world.step(1)[0]["state"], seen["state"])  # the same level, told or not


@pytest.mark.parametrize(
    ("of", "options", "word", "told"),
    [
        ("MiniGrid", {"level": "Empty-5x5-v0"}, "go forward", "Mission: get to the green goal square"),
        ("Arcade", {"size": 42, "wait": 0}, "right and fire", "Score: 0"),
        ("Crafter", {"area": 16}, "place table", "You have health 9"),
    ],
)
def test_worlds_are_told_drawn_and_named_by_themselves(of, options, word, told):
    env = lifted(of, options=options, observe="both")
    seen = env.reset(seed=1)[0]
    assert word in env.unwrapped.batch.words[0] and told in seen["message"]
    plain = gymnasium.make(f"embodied_rft/{of}-v0", **options)
    plain.reset(seed=1)
    number = env.unwrapped.batch.words[0].index(word)
    seen, shown = env.step(say(word))[0], plain.step(number)[0]
    assert np.array_equal(seen["image"], shown["image"]) and "expert" not in seen


@pytest.mark.parametrize(
    ("of", "options"),
    [
        ("BabyAI", LEVEL),
        ("BabyAI", {"level": "PickupLoc-v0", "observation": "state"}),
        ("TextGame", {"games": 3, "held_out": 3, "length": 10}),
    ],
)
def test_experts_speak(of, options):
    """Their conversations succeed, more slowly with noise; what they would do is no part of what is told or stated."""
    pytest.importorskip(PACKAGES[of])
    reads = {"of": f"embodied_rft/{of}-v0", "told": True, "state": of == "BabyAI"}
    options = {**reads, "options": {**options, "expert": True}}
    pool = make_pool(ANY, 3, options=options)
    player = make_demonstrator(ANY, env_options=options, thought="state")
    recording = Collector(pool, run_seed=0).collect(demonstrator_act(player, np.random.default_rng(0)), episodes=6)
    assert np.mean(recording.successes) == 1
    noisy = demonstrator_act(make_demonstrator(ANY, env_options=options, noise=0.5), np.random.default_rng(0))
    assert Collector(pool, run_seed=0).collect(noisy, episodes=6).decisions > recording.decisions
    seen = pool.reset(np.arange(3))
    expert = seen["expert"] if of == "TextGame" else [player.lifted.words[0][number] for number in seen["expert"]]
    assert [player.lifted.parser.parse(reply).action for reply in player.act(seen, None)] == list(expert)
    if of == "BabyAI":
        blind = make_pool(ANY, 3, options={**options, "options": {**options["options"], "expert": False}})
        shown = blind.reset(np.arange(3))
        assert np.array_equal(shown["state"], seen["state"]) and shown["message"] == seen["message"]
        with pytest.raises(ValueError, match=r"set env\.options\.options\.expert to true"):
            player.act(shown, None)


def test_a_text_game_is_answered_through_a_parser():
    """The same game, whatever frame its commands come in; what is not in it moves nothing."""
    options = {"games": 2, "held_out": 2, "expert": True}
    env = lifted("TextGame", options=options)
    plain = gymnasium.make("embodied_rft/TextGame-v0", **options)
    seen, first = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    assert seen["message"].split("\n")[1] == "Answer like <think>...</think><answer>look</answer>. Actions: any text."
    listed = first["message"].split("\n")[-1].removeprefix("Commands: ")
    assert seen["message"].split("\n")[-1] == f"Legal: {listed}"
    assert "not understood: no answer" in env.step(first["expert"])[0]["message"]
    over = False
    while not over:
        seen, reward, over, _, info = env.step(say(first["expert"]))
        first, paid, done, *_ = plain.step(first["expert"])
        assert (reward, over) == (paid, done) and first["message"].split("\n")[0] in seen["message"]
    assert info["is_success"] == 1
    bare = lifted("TextGame", options={**options, "admissible": False}).reset(seed=3)[0]
    assert listed not in bare["message"] and "Legal" not in bare["message"]


def test_numbers_are_any_within_the_bounds():
    env, plain = gymnasium.make(ANY, of="Pendulum-v1", numbers=True), gymnasium.make("Pendulum-v1")
    assert (
        "Answer like <think>...</think><answer>0</answer>. Actions: a number from -2 to 2."
        in (env.reset(seed=0)[0]["message"])
    )
    plain.reset(seed=0)
    paid = plain.step(np.array([-1.37], np.float32))[1]
    assert env.step(say("-1.37"))[1] == pytest.approx(paid)
    for wrong in ("2.1", "nan", "1e999", "1 1", "left", "1_0", "-"):
        assert env.step(say(wrong))[1] == 0, wrong
    assert env.step(say(" [ 2.0 ] "))[4]["invalid/unknown_word"] == 7
    arm = gymnasium.make(ANY, of="embodied_rft/FetchReach-v0", numbers=True, parser="json")
    how = arm.reset(seed=0)[0]["message"].split("\n")[0]
    assert how.endswith("Actions: 4 numbers, with blanks between them, each from -1 to 1.")
    assert arm.step('{"action": [0.25, -1, 1, 0]}')[4]["invalid/unknown_word"] == 0


def test_a_demonstrator_says_its_numbers():
    options = {"of": "embodied_rft/FetchReach-v0", "numbers": True, "state": True}
    speech = make_demonstrator(ANY, env_options=options).lifted.speech
    for action in np.random.default_rng(0).uniform(-1.2, 1.2, (50, 4)):
        assert np.allclose(speech.read(speech.say(action)), np.clip(action, -1, 1), atol=1e-3)


def test_answers_at_random_show_the_form_and_nothing_else():
    options = {"of": "Acrobot-v1", "parser": STRICT, "style": "short", "turns": 20}
    pool = make_pool(ANY, 8, options=options)
    act = demonstrator_act(make_demonstrator(ANY, env_options=options, noise=1.0), np.random.default_rng(0))
    recording = Collector(pool, run_seed=0).collect(act, episodes=16)
    assert not any(recording.metrics().get(f"collect/invalid/{kind}", 0) for kind in ("unknown_word", "empty"))
    assert recording.decisions == 16 * 20
    with pytest.raises(ValueError, match="no scripted demonstrator for 'Acrobot-v1'.*With noise: 1"):
        make_demonstrator(ANY, env_options=options, noise=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "MiniGrid-Empty-5x5-v0"}, "'image' of the observations of .* is too large to be told"),
        ({"of": "CartPole-v1", "menu": True}, "does not tell what is legal"),
        ({"of": "embodied_rft/FrozenLake-v0", "menu": True, "instead": "1"}, "instead has no effect beside menu"),
        ({"of": "CartPole-v1", "numbers": True}, "numbers have no effect"),
        ({"of": "Pendulum-v1", "numbers": True, "bins": 3}, "bins and words have no effect beside numbers"),
        ({"of": "Pendulum-v1", "numbers": True, "instead": "3"}, "instead is '3', which is no action"),
        ({"of": "embodied_rft/FetchReach-v0", "numbers": True, "parser": "words"}, "set its option strict to true"),
        ({"of": "embodied_rft/TextGame-v0", "words": ["look"]}, "words have no effect on actions"),
        ({"of": "embodied_rft/BabyAI-v0", "options": {"level": "GoToOb-v0"}}, "did you mean 'GoToObj-v0'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    for package in {"MiniGrid": "minigrid", "BabyAI": "minigrid", "TextGame": "textworld"}.items():
        if package[0] in options["of"]:
            pytest.importorskip(package[1])
    with pytest.raises(ValueError, match=message):
        gymnasium.make(ANY, **options)


def test_a_menu_numbers_what_is_legal():
    options = {"games": 2, "held_out": 2, "expert": True}
    env = lifted("TextGame", options=options, menu=True, style="short", parser=STRICT)
    seen, over = env.reset(seed=3)[0], False
    goal, *listed = seen["message"].split("\n")
    assert [line.split(" ", 1) for line in listed] == [[str(n), a] for n, a in enumerate(seen["legal"].split("\n"), 1)]
    assert env.step(str(len(listed) + 1))[4]["invalid/unknown_word"] == 1  # nothing has this number
    assert env.step(seen["expert"])[4]["invalid/unknown_word"] == 2  # a number is asked for
    while not over:
        last = seen["expert"]
        seen, reward, over, *_ = env.step(str(seen["legal"].split("\n").index(last) + 1))
    assert reward == 1 and last == goal
    lake = gymnasium.make(ANY, of="embodied_rft/FrozenLake-v0", menu=True, state=True)
    assert lake.reset(seed=0)[0]["message"].split("\n")[-2:] == ["1 down", "2 right"]
    assert lake.step(say(2))[0]["message"].split("\n")[-3:] == ["1 left", "2 down", "3 right"]  # it is no corner


@pytest.mark.parametrize("of", ["TextGame", "BabyAI"])
def test_a_lifted_world_goes_on_bit_by_bit_elsewhere(of):
    pytest.importorskip(PACKAGES[of])
    inside = {"TextGame": {"games": 2, "held_out": 2}, "BabyAI": {"level": "GoToObj-v0"}}[of]
    options = {"of": f"embodied_rft/{of}-v0", "options": inside, "menu": True, "style": "short", "parser": STRICT}
    first, second = (make_pool(ANY, 2, options=options) for _ in range(2))
    first.reset(np.arange(2)), second.reset(np.arange(2) + 4)
    first.step(["1", "2"])
    second.set_state(first.get_state())
    for answers in (["2", "1"], ["no", "3"], ["1", "1"]):
        told, again = first.step(answers), second.step(answers)
        assert told.observation["message"] == again.observation["message"]
        assert told.reward.tolist() == again.reward.tolist()


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize(
    "inside",
    [
        {"of": "embodied_rft/TextGame-v0", "options": {"games": 2, "held_out": 2, "expert": True}},
        {"of": "embodied_rft/FrozenLake-v0", "state": True},
    ],
    ids=["TextGame", "FrozenLake"],
)
def test_demonstrators_choose_from_menus(inside, noise):
    pytest.importorskip("textworld")
    options = {**inside, "menu": True}
    pool = make_pool(ANY, 2, options=options)
    act = demonstrator_act(make_demonstrator(ANY, env_options=options, noise=noise), np.random.default_rng(0))
    recording = Collector(pool, run_seed=0).collect(act, episodes=4)
    assert noise or np.mean(recording.successes) == 1
    assert all(value == 0 for key, value in recording.metrics().items() if "invalid/" in key)


def test_who_holds_the_pole_speaks():
    """Alone and in a conversation the same pushes; with noise the pole falls sooner."""
    options = {"of": "CartPole-v1", "words": ["left", "right"], "parser": STRICT, "state": True, "turns": 200}
    lengths = {}
    for id, opts in ((ANY, options), ("CartPole-v1", {})):
        for noise in (0.0, 0.8):
            pool = make_pool(id, 4, options=opts)
            act = demonstrator_act(make_demonstrator(id, env_options=opts, noise=noise), np.random.default_rng(0))
            lengths[id, noise] = Collector(pool, run_seed=0).collect(act, episodes=4).decisions / 4
    assert lengths[ANY, 0.0] == 200 and lengths["CartPole-v1", 0.0] == 500
    assert max(lengths[ANY, 0.8], lengths["CartPole-v1", 0.8]) < 150
