"""Numbers and cards: their rules against slow, plain ones, Gymnasium's where it has the game, or cases by hand."""

import itertools
import operator
from collections import Counter
from fractions import Fraction

import numpy as np
from gymnasium.envs.toy_text import blackjack as official_blackjack

from embodied_rft.envs.games.black_jack import BlackJack, total
from embodied_rft.envs.games.general_points import LENGTH, WORDS, GeneralPoints
from embodied_rft.envs.games.number_line import NumberLine
from embodied_rft.envs.games.points import EZPoints, Points24, solve, values
from tests.envs.games.moves import dice, move, write

# --- NumberLine ---


def test_number_line_by_hand():
    game = NumberLine(max_position=3)
    now = {"target": np.array([2, 2, 0, 3]), "current": np.array([1, 1, 0, 3])}
    assert move(game, now, [1, 0, 0, 1]) == (
        [1, -1, 0, 0],
        *[[True, False, True, True]] * 2,
        [True, True, False, False],
    )
    assert now["current"].tolist() == [2, 0, 0, 3]
    now = {"target": np.array([3]), "current": np.array([0])}
    assert [move(game, now, [action])[0][0] for action in (0, 1, 0, 1, 1, 1)] == [-1, 0, -1, 0, 0, 1]
    assert game.limit == 6


def test_number_line_begins_everywhere_but_at_the_target():
    now = NumberLine().deal(dice(600))
    pairs = Counter(zip(now["target"].tolist(), now["current"].tolist()))
    assert set(pairs) == set(itertools.permutations(range(6), 2)) and min(pairs.values()) > 5


# --- EZPoints and Points24 ---


def hand(*ranks, game):
    return game.empty(1) | {"rank": np.array([ranks])}


def test_ez_points_by_hand():
    game = EZPoints()
    assert write(game, hand(5, 7, game=game), "5 + 7 =") == ([0, 0, 0, 10], True, True)
    assert write(game, hand(13, 2, game=game), "10 + 2 =") == ([0, 0, 0, 10], True, True)  # a king
    assert write(game, hand(6, 2, game=game), "6 + 2 =") == ([0, 0, 0, -1], True, False)
    assert write(game, hand(5, 7, game=game), "=") == ([-1], True, False)
    assert write(game, hand(6, 6, game=game), "6 + 6 =") == ([0, 0, 0, 10], True, True)
    assert write(game, hand(5, 7, game=game), "5 5 9 + 7 =") == (
        [0, -1, -1, 0, 0, 10],
        True,
        True,
    )  # invalid words are empty
    assert write(game, hand(5, 7, game=game), "+ + + + + + =") == ([0] * 6 + [-1], True, False)  # full


def test_what_python_would_evaluate_is_no_formula():
    game = EZPoints()
    assert write(game, hand(1, 2, game=game), "1 2 =") == ([0, 0, -1], True, False)
    game = Points24(target=16)
    assert write(game, hand(2, 4, 1, 1, game=game), "2 * * 4 * 1 * 1 =")[1:] == (True, False)
    assert write(game, hand(2, 8, 1, 1, game=game), "8 / / 1 * 2 * 1 =")[1:] == (True, False)


def test_points_24_by_hand():
    game = Points24()
    assert write(game, hand(12, 4, 7, 5, game=game), "( 10 - 4 ) * ( 7 - 5 ) =")[1:] == (True, False)
    assert write(game, hand(6, 4, 1, 1, game=game), "6 * 4 * 1 * 1 =") == ([0] * 7 + [10], True, True)
    assert write(game, hand(6, 4, 1, 1, game=game), "6 * 4 =")[2] is False  # not every card
    assert write(game, hand(3, 3, 8, 8, game=game), "8 / ( 3 - 8 / 3 ) =")[1:] == (True, True)  # thirds, exactly
    by_rank = Points24(face_cards="rank")
    assert write(by_rank, hand(12, 2, 1, 1, game=by_rank), "12 * 2 * 1 * 1 =")[2] is True
    assert write(game, hand(12, 2, 1, 1, game=game), "10 * 2 * 1 * 1 =")[2] is False


def bracketed(f, g, h, a, b, c, d):
    """Four numbers and three signs with all five ways of setting brackets."""
    yield lambda: h(g(f(a, b), c), d)
    yield lambda: g(f(a, b), h(c, d))
    yield lambda: h(f(a, g(b, c)), d)
    yield lambda: f(a, h(g(b, c), d))
    yield lambda: f(a, g(b, h(c, d)))


def slow_solvable(numbers, target):
    """All orders, signs and brackets."""
    signs = (operator.add, operator.sub, operator.mul, operator.truediv)
    for order in set(itertools.permutations(map(Fraction, numbers))):
        for three in itertools.product(signs, repeat=3):
            for formula in bracketed(*three, *order):
                try:
                    if formula() == target:
                        return True
                except ZeroDivisionError:
                    pass
    return False


def test_the_solver_finds_what_there_is():
    rng = np.random.default_rng(0)
    for _ in range(25):
        numbers = tuple(sorted(rng.integers(1, 14, 4).tolist()))
        words = solve(numbers, 24)
        assert (words is not None) == slow_solvable(numbers, 24)
        if words is not None:
            assert eval(" ".join(f"Fraction({w})" if w.isdigit() else w for w in words)) == 24
            assert tuple(sorted(int(w) for w in words if w.isdigit())) == numbers and len(words) <= 11


def test_deals_of_points():
    now = EZPoints().deal(dice(400))
    cards = np.minimum(now["rank"], 10)
    sums, products = cards.sum(1) == 12, cards.prod(1) == 12
    assert (sums | products).all() and 20 < (products & ~sums).sum() < 150
    assert len(np.unique(now["suit"])) == 4 and (now["rank"] > 10).any()
    hands = Points24(solvable=True).deal(dice(60))["rank"]
    assert all(solve(tuple(sorted(h)), 24) for h in values(hands, "ten").tolist())
    free = Points24().deal(dice(400))["rank"]
    counts = np.bincount(free.ravel(), minlength=14)[1:]
    assert (abs(counts - 1600 / 13) < 50).all()
    assert 0.5 < np.mean([solve(tuple(sorted(h)), 24) is not None for h in values(free, "ten").tolist()]) < 0.85


# --- GeneralPoints ---


def answer(game, ranks, *formulas):
    now = game.empty(1) | {"rank": np.array([ranks]), "left": np.array([game.tries])}
    told = []
    for formula in formulas:
        words = [WORDS.index(word) for word in formula.split()]
        told.append(move(game, now, [words + [0] * (LENGTH - len(words))]))
    return [(reward, over, success, valid) for (reward,), (over,), (success,), (valid,) in told]


def test_the_verifier_by_hand():
    game = GeneralPoints(tries=4)
    cards = (6, 4, 1, 1)
    assert answer(game, cards, "6 + 4 + 1 + 1", "6 * 4", "6 * 4 * 1 * 2", "6 * * 4") == [
        (-1, False, False, True), (-2, False, False, False), (-2, False, False, False), (-3, True, False, False),
    ]  # fmt: skip
    assert answer(game, cards, "", "6 * 4 * 1 * 1") == [(-3, False, False, False), (5, True, True, True)]


def test_the_rule_variant_is_another_rule():
    cards, ten, rank = (12, 2, 1, 1), "10 * 2 + 1 + 1", "12 * 2 * 1 * 1"
    told = {face: answer(GeneralPoints(face_cards=face), cards, ten, rank) for face in ("ten", "rank")}
    assert [each[0] for each in told["ten"]] == [-1, -2] and [each[0] for each in told["rank"]] == [-2, 5]


def test_the_visual_variant_is_other_suits_of_the_same_cards():
    black, red = (GeneralPoints(suits=suits) for suits in ("black", "red"))
    a, b = black.deal(dice(50)), red.deal(dice(50))
    assert np.array_equal(a["rank"], b["rank"]) and set(a["suit"].flat) == {0, 3} and set(b["suit"].flat) == {1, 2}
    assert (black.draw(a) != red.draw(b)).any((1, 2, 3)).all()
    reddish = lambda pictures: ((pictures[..., 0] == 200) & (pictures[..., 1] == 20)).any((1, 2))  # noqa: E731
    assert not reddish(black.draw(a)).any() and reddish(red.draw(b)).all()


def test_hands_of_general_points_can_be_solved_and_may_need_the_rule():
    now = GeneralPoints(face_cards="rank", needs_face=True).deal(dice(40))
    assert all(solve(tuple(sorted(h)), 24) for h in now["rank"].tolist()) and (now["rank"] > 10).any(1).all()


# --- BlackJack ---


def test_points_of_hands_are_gymnasiums():
    rng = np.random.default_rng(0)
    for _ in range(200):
        cards = 1 + rng.integers(52, size=rng.integers(2, 7))
        theirs = [min((card - 1) % 13 + 1, 10) for card in cards]
        points, usable = total(np.concatenate([cards, np.zeros(3, int)])[None])
        assert points[0] == official_blackjack.sum_hand(theirs)
        assert usable[0] == bool(official_blackjack.usable_ace(theirs))


def test_black_jack_by_hand():
    game = BlackJack(natural=True)

    def play(player, dealer, action):
        now = game.empty(1)
        now["player"][0, : len(player)], now["dealer"][0, : len(dealer)] = player, dealer
        return move(game, now, [action])[:3]

    assert play([10, 9], [10, 8], 0) == ([1], [True], [True])
    assert play([10, 8], [10, 8], 0) == ([0], [True], [False])
    assert play([10, 7], [10, 8], 0) == ([-1], [True], [False])
    assert play([1, 12], [10, 8], 0) == ([1.5], [True], [True])  # natural
    assert play([7, 7, 7], [10, 8], 0) == ([1], [True], [True])  # 21, but no natural
    now = game.empty(300)
    now["player"][:, :2] = 10
    reward, over, _, _ = move(game, now, np.ones(300, int))
    ace = (now["player"][:, 2] - 1) % 13 == 0  # on twenty, everything else is too much
    assert 5 < ace.sum() < 50 and np.array_equal(reward, np.where(ace, 0, -1)) and np.array_equal(over, ~ace)


def test_the_dealer_draws_to_seventeen_and_the_deck_is_endless():
    game, count = BlackJack(), 3000
    now = game.deal(dice(count))
    tens = np.isin((now["player"][:, :2] - 1) % 13, (9, 10, 11, 12)).mean()
    assert abs(tens - 4 / 13) < 0.02
    move(game, now, np.zeros(count, int), dice(count, 1))
    points = total(now["dealer"])[0]
    assert points.min() == 17 and abs((points > 21).mean() - 0.282) < 0.03  # known: 28.2 % of dealers bust
