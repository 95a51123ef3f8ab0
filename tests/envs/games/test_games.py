"""What holds for every game: seeds, exact states, pictures that tell states apart, words, players, options."""

import gymnasium
import numpy as np
import pytest

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.frozen_lake import FrozenLake
from embodied_rft.envs.games.game import Dice
from embodied_rft.envs.games.points import solve, values
from embodied_rft.names import UserError
from embodied_rft.pools.promises import same
from embodied_rft.testing.check_env import check_env
from tests.envs.games.levels import ALL, LEVELS, make, play, player
from tests.lab.harness import fails


def story(env, count, *, seed=None, start=None, noise=0.5):
    """What `count` steps with reset by hand tell; `start` continues from a state."""
    rng, told = np.random.default_rng(1), []
    mine = player(env.spec.id.removeprefix("embodied_rft/").removesuffix("-v0"), noise=noise)
    observation = env.set_state(start) if start is not None else env.reset(seed=seed)[0]
    told.append(observation)
    for _ in range(count):
        if env.ended.any():
            observation, _ = env.reset(options={"reset_mask": env.ended.copy()})
        answer = env.step(mine.act(observation, rng))
        observation = answer[0]
        told.append(answer)
    return told


@pytest.mark.parametrize("game, options", ALL)
def test_the_checker_passes_and_single_equals_vector(game, options):
    check_env(f"embodied_rft/{game}-v0", options={"observation": "both", **options})


@pytest.mark.parametrize("game", LEVELS)
def test_a_seed_is_an_episode_whatever_runs_beside_it(game):
    few, many = make(game, 2, observation="both"), make(game, 5, observation="both")
    a, b = few.reset(seed=[7, 3])[0], many.reset(seed=[1, 3, 2, 7, 5])[0]
    for key in a:
        assert np.array_equal(a[key], b[key][[3, 1]])
        assert len(np.unique(many.reset(seed=range(5))[0][key], axis=0)) > 1


def continues(game, *, forget=()):
    env = make(game, 4, observation="both")
    before = story(env, 7, seed=0)
    state = env.get_state()
    after = story(env, 12, start=state)
    story(env, 5, seed=1)
    for name in forget:
        state[name] = np.zeros_like(state[name])
    other = make(game, 4, observation="both")
    other.reset(seed=9)
    assert len(before) == 8 and same(story(other, 12, start=state), after)


@pytest.mark.parametrize("game", LEVELS)
def test_states_are_exact(game):
    continues(game)


@pytest.mark.parametrize("game", ["TwentyFortyEight", "Swap", "BlackJack"])
def test_a_state_that_forgets_its_dice_is_not(game):
    fails(continues, game, forget=["keys"])
    fails(continues, game, forget=["thrown"])


def test_a_state_of_another_game_is_refused():
    state = make("FrozenLake", 2).get_state()
    with pytest.raises(UserError, match=r"state\['now/map'\] has shape \(2, 4, 4\), expected \(2, 5, 5\)"):
        make("FrozenLake", 2, size=5).set_state(state)


@pytest.mark.parametrize("game, options", ALL)
def test_the_player_wins(game, options):
    least = next(least for known, least in LEVELS[game] if known == options)
    rng, mine = np.random.default_rng(0), player(game)
    won, _, invalid = play(make(game, 100, **options), lambda seen: mine.act(seen, rng))
    assert won.mean() >= least and not invalid.any()


@pytest.mark.parametrize("game", [game for game in LEVELS if game != "BlackJack"])
def test_who_acts_at_random_loses(game):
    options = LEVELS[game][-1][0]
    rng, mine = np.random.default_rng(0), player(game, noise=1.0)
    won, _, invalid = play(make(game, 100, **options), lambda seen: mine.act(seen, rng))
    assert won.mean() < 0.5 and invalid.sum() > 50


def tells_apart(game, make=make, **options):
    """Whoever sees the picture knows the state."""
    env, seen = make(game, 32, observation="both", **options), {}
    for answer in story(env, 60, seed=0):
        observation = answer if isinstance(answer, dict) else answer[0]
        for picture, state in zip(observation["image"], observation["state"]):
            assert seen.setdefault(picture.tobytes(), state.tobytes()) == state.tobytes()
    assert len(seen) > 20


@pytest.mark.parametrize("game, options", [(game, options) for game, options in ALL if options != {"max_position": 2}])
def test_pictures_tell_states_apart(game, options):
    tells_apart(game, **options)


def test_a_picture_in_which_holes_look_like_ice_does_not():
    def blind(*args, **options):
        env = make(*args, **options)
        env.batch.task.sprites[1] = env.batch.task.sprites[0]
        return env

    fails(tells_apart, "FrozenLake", blind)


@pytest.mark.parametrize("game", LEVELS)
def test_words_say_what_is_legal(game):
    env = make(game, 6)
    story(env, 3, seed=0, noise=0.3)
    for row in range(6):
        said = env.batch.describe(row)
        assert said.rules and said.state and said.state in said.text
        counts = [len(words) for words in said.words]
        assert gymnasium.spaces.MultiDiscrete(counts) == gymnasium.spaces.MultiDiscrete(
            np.atleast_1d(getattr(env.single_action_space, "nvec", getattr(env.single_action_space, "n", None)))
        )
    if said.legal is None:
        assert game == "GeneralPoints"
        return
    rng = np.random.default_rng(0)
    for _ in range(30):
        if env.ended.any():
            env.reset(options={"reset_mask": env.ended.copy()})
        actions = player(game, noise=0.6).act(env.batch.observe(np.arange(6)), rng)
        legal = [env.batch.describe(row).legal for row in range(6)]
        before = env.batch.invalid_moves.copy()
        env.step(actions)
        says = [env.batch.task.say(action) for action in actions]
        assert ((env.batch.invalid_moves == before) == [words in mine for words, mine in zip(says, legal)]).all()


def test_the_text_lists_words_but_no_solution():
    lake, tiles = make("FrozenLake", 1), make("ShisenSho", 1)
    lake.reset(seed=0), tiles.reset(seed=0)
    assert lake.batch.describe(0).text.endswith("Legal: down, right") and "P_" in lake.batch.render(0, "ansi")
    assert tiles.batch.describe(0).legal and "Legal" not in tiles.batch.describe(0).text


def test_players_read_states_and_say_so():
    env = make("Sokoban", 1, observation="image")
    with pytest.raises(UserError, match=r"set env.options.observation to both"):
        player("Sokoban").act(env.reset(seed=0)[0], np.random.default_rng(0))
    with pytest.raises(UserError, match="noise is 2: the share of random moves"):
        player("Sokoban", noise=2)


def test_scale_repeats_pixels():
    small, large = (make("NumberLine", 2, observation="image", scale=scale) for scale in (1, 3))
    a, b = (env.reset(seed=0)[0]["image"] for env in (small, large))
    assert np.array_equal(a.repeat(3, 1).repeat(3, 2), b)


def test_pictures_that_were_given_away_stay_as_they_are():
    env = make("FrozenLake", 3, observation="image")
    first = env.reset(seed=0)[0]["image"]
    kept = first.copy()
    env.step([1, 1, 1])
    env.reset(options={"reset_mask": np.array([True, False, False])}, seed=5)
    assert np.array_equal(first, kept)


BAD = [
    ("NumberLine", {"max_position": 0}, "max_position is 0; expected 1 to 99"),
    ("EZPoints", {"target": 2}, "target is 2; expected 3 to 20"),
    ("Points24", {"target": 0}, "target is 0; expected 1 to 100"),
    ("Points24", {"face_cards": "eleven"}, "expected 'ten'"),
    ("BlackJack", {"dealer_stands": 22}, "dealer_stands is 22; expected 2 to 21"),
    ("GeneralPoints", {"face_cards": "eleven"}, "expected 'ten'"),
    ("GeneralPoints", {"suits": "blak"}, "did you mean 'black'"),
    ("GeneralPoints", {"tries": 0}, "tries 0; expected"),
    ("GeneralPoints", {"cards": 5}, "cards is 5; expected 2 to 4"),
    ("TwentyFortyEight", {"goal": 100}, "goal is 100; expected a power of two"),
    ("TwentyFortyEight", {"size": 1}, "size is 1; expected 2 to 6"),
    ("TwentyFortyEight", {"reward": "scor"}, "did you mean 'score'"),
    ("ShisenSho", {"size": 5}, "size is 5; expected an even number"),
    ("ShisenSho", {"colors": 1}, "1 colors and 6 shapes .* make 6 kinds of tile; a board of size 6 has 9"),
    ("Swap", {"kinds": 2}, "kinds 2; expected 4 to 12, and 3 to 12"),
    ("Swap", {"moves": 0}, "moves is 0"),
    ("Swap", {"reward": "signs"}, "did you mean 'sign'"),
    ("Sokoban", {"boxes": 9}, "boxes 9; expected 5 to 16 squares"),
    ("Sokoban", {"reward": "spars"}, "did you mean 'sparse'"),
    ("FrozenLake", {"size": 1}, "size is 1; expected 2 to 16"),
    ("FrozenLake", {"ice": 0.1}, "ice is 0.1 and slip 0.0; expected 0.3 to 1"),
    ("FrozenLake", {"observation": "images"}, "did you mean 'image'"),
    ("FrozenLake", {"scale": 0}, "scale is 0; expected at least 1"),
]


@pytest.mark.parametrize("game, options, message", BAD)
def test_bad_options_are_refused(game, options, message):
    with pytest.raises(UserError, match=message):
        make(game, 2, **options)


# --- dice and drawing ---


def test_dice_are_splitmix64_and_each_row_has_its_own():
    keys, thrown = np.array([0, 1234567], np.uint64), np.zeros(2, np.uint64)
    dice = Dice(keys, thrown, np.arange(2))
    first = dice.uniform(1)
    assert first[0, 0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53  # the published first number of seed 0
    assert first[1, 0] == (6457827717110365317 >> 11) * 2.0**-53  # and of seed 1234567
    alone = Dice(keys, np.array([0, 1], np.uint64), np.array([1]))
    assert np.array_equal(alone.uniform(3), dice.of(np.array([False, True])).uniform(3)) and thrown.tolist() == [1, 4]


def test_dice_are_fair():
    dice = Dice(np.arange(500, dtype=np.uint64), np.zeros(500, np.uint64), np.arange(500))
    counts = np.bincount(dice.roll(6, 120).ravel(), minlength=6)
    assert (abs(counts - 10_000) < 400).all()
    assert np.array_equal(np.sort(dice.shuffle(7), 1), np.tile(np.arange(7), (500, 1)))


def test_a_letter_is_drawn_as_it_should_look():
    lines = ["".join("#" if ink else "." for ink in line) for line in drawing.text("7")[:, :5, 0] == 0]
    assert lines == ["#####", "....#", "...#.", "..#..", ".#...", ".#...", ".#..."]
    assert drawing.text("10", scale=3).shape == (21, 36, 3)


def test_all_cards_and_all_tiles_look_different():
    assert len(np.unique(drawing.deck().reshape(54, -1), axis=0)) == 54
    assert len(np.unique(FrozenLake().sprites.reshape(6, -1), axis=0)) == 6
    sprites = make("ShisenSho", 1).batch.task.sprites
    assert len(np.unique(sprites.reshape(len(sprites), -1), axis=0)) == 37


def test_the_player_of_points_24_wins_all_that_can_be_won():
    env, mine, rng = make("Points24", 60), player("Points24"), np.random.default_rng(0)
    env.reset(seed=0)
    hands = values(env.batch.now["rank"], "ten").tolist()
    won, *_ = play(env, lambda seen: mine.act(seen, rng))
    assert won.tolist() == [solve(tuple(sorted(hand)), 24) is not None for hand in hands]
