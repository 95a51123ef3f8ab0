"""EZPoints and Points24: make 12 of two cards, 24 of four, word by word (Zhai et al. 2024, RL4VLM, arXiv:2405.10292).

A decision writes one word of a formula. "=" ends the episode: reward 10 if the formula has the target's value and uses
every card, else -1. A number that no unused card has is invalid: -1, and an empty word is written. A formula is full
with 6 words (Points24: 21); whatever comes then ends the episode with -1. Everything else gives 0.

Two differences from the authors' code, which evaluates the joined words as Python: only + - * / and brackets between
whole numbers count here, so "1" "2" is not 12, and "*" "*" is no power.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Literal

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Player, Position
from embodied_rft.envs.text.rules import evaluate_expression
from embodied_rft.names import UserError
from embodied_rft.registry import register

FaceCards = Literal["ten", "rank"]
read = lru_cache(maxsize=10_000)(evaluate_expression)


def values(ranks: np.ndarray, face_cards: FaceCards) -> np.ndarray:
    """What cards count: J, Q and K ten each, or 11, 12 and 13."""
    return np.minimum(ranks, 10) if face_cards == "ten" else ranks


@lru_cache(maxsize=100_000)
def solve(numbers: tuple[int, ...], target: int, operators: str = "+-*/") -> tuple[str, ...] | None:
    """A formula of all `numbers`, as words, that has the value `target`; None: there is none. Exact fractions.

    A value is kept as (numerator, denominator), and as the words of its formula.
    """

    def search(parts: list[tuple[int, int, tuple[str, ...]]]) -> tuple[str, ...] | None:
        if len(parts) == 1:
            above, below, words = parts[0]
            return words if above == target * below else None
        for i in range(len(parts)):
            for j in range(len(parts)):
                if i == j:
                    continue
                (a, b, left), (c, d, right) = parts[i], parts[j]
                rest = [part for k, part in enumerate(parts) if k not in (i, j)]
                for sign in operators:
                    if (sign in "+*" and i > j) or (sign == "/" and c == 0):
                        continue
                    whole = {"+": (a * d + c * b, b * d), "-": (a * d - c * b, b * d), "*": (a * c, b * d)}
                    above, below = whole[sign] if sign != "/" else (a * d, b * c)
                    found = search([*rest, (above, below, (*_bracket(left), sign, *_bracket(right)))])
                    if found:
                        return found
        return None

    return search([(number, 1, (str(number),)) for number in sorted(numbers)])


def _bracket(words: tuple[str, ...]) -> tuple[str, ...]:
    return words if len(words) == 1 else ("(", *words, ")")


class Points(Game):
    """What EZPoints and Points24 share."""

    num_cards: int
    operators: str
    room: int  # words before a formula is full, less one

    def __init__(self, *, target: int, face_cards: FaceCards) -> None:
        if face_cards not in ("ten", "rank"):
            raise UserError(f"face_cards is {face_cards!r}; expected 'ten' (J, Q and K are 10) or 'rank' (11, 12, 13)")
        self.target, self.face_cards = target, face_cards
        numbers = [str(number) for number in range(1, 11 if face_cards == "ten" else 14)]
        self.words = ((*numbers, *self.operators, "="),)
        self.num_numbers, self.equals = len(numbers), len(self.words[0]) - 1
        self.arrays = {"rank": (self.num_cards,), "suit": (self.num_cards,), "formula": (self.room + 1,), "length": ()}
        self.sizes = [2, 101, *[len(self.words[0]) + 2] * (self.room + 1), *[14] * self.num_cards]
        count = "10" if face_cards == "ten" else "11, 12 and 13"
        self.rules = (
            f"Write a formula that equals {target}, a word at a time, with every card once. J, Q and K count {count}. "
            f"Words: {' '.join(self.words[0])}. End it with =. An invalid word is shown as ?."
        )
        lines = -(-(self.room + 1) // 7)
        self.background = drawing.canvas(1, 40 + 10 * lines, 132, drawing.TABLE)
        style = {"color": drawing.WHITE, "background": drawing.TABLE}
        self.signs = drawing.labels(["   ", *self.words[0], "?"], **style)  # first nothing, last an invalid word

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether a number is that of an unused card, and there is room."""
        number = actions + 1
        cards = (values(now["rank"], self.face_cards) == number[:, None]).sum(1)
        used = (now["formula"] == number[:, None]).sum(1)
        return (now["length"] <= self.room) & ((actions >= self.num_numbers) | (used < cards))

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """See the module."""
        full, ends = now["length"] > self.room, actions == self.equals
        writes = np.flatnonzero(~full & ~ends)
        now["formula"][writes, now["length"][writes]] = np.where(valid, actions + 1, len(self.words[0]) + 1)[writes]
        now["length"][writes] += 1
        right = np.zeros(len(actions), bool)
        for row in np.flatnonzero(ends & ~full):
            right[row] = self._is_right(now["rank"][row], now["formula"][row])
        over = full | ends
        return Moves(np.where(right, 10.0, np.where(over | ~valid, -1.0, 0.0)), over, right)

    def _is_right(self, ranks: np.ndarray, formula: np.ndarray) -> bool:
        names = ("", *self.words[0], "")
        said = read(" ".join(names[word] for word in formula))
        cards = Counter(values(ranks, self.face_cards).tolist())
        return said is not None and said[0] == self.target and Counter(said[1]) == cards

    def symbols(self, now: Position) -> np.ndarray:
        """What face cards count (0: ten), the target, the words of the formula, the ranks of the cards."""
        told = np.tile([int(self.face_cards == "rank"), self.target], (len(now["rank"]), 1))
        return np.concatenate([told, now["formula"], now["rank"]], 1)

    def draw(self, now: Position) -> np.ndarray:
        """The cards on a table, the formula below, seven words a line."""
        pictures = self.background.repeat(len(now["rank"]), 0)
        for i in range(self.num_cards):
            card = np.where(now["rank"][:, i] > 0, now["rank"][:, i] - 1 + 13 * now["suit"][:, i], 53)
            drawing.put(pictures, drawing.deck()[card], 6, 5 + 26 * i)
        for i in range(self.room + 1):
            drawing.put(pictures, self.signs[now["formula"][:, i]], 40 + 10 * (i // 7), 3 + 18 * (i % 7))
        return pictures

    def tell(self, now: Position) -> str:
        """Cards and formula."""
        cards = ", ".join(drawing.RANKS[rank - 1] for rank in now["rank"][0])
        names = ("", *self.words[0], "?")
        return f"Cards: {cards}\nFormula: {' '.join(names[word] for word in now['formula'][0] if names[word])}"


class EZPoints(Points):
    """Write a formula of two cards with + and * that equals the target.

    Args:
        target: what the formula is to equal; there is always a solution.
    """

    num_cards, operators, room = 2, "+*", 5

    def __init__(self, *, target: int = 12) -> None:
        if not 3 <= target <= 20:
            raise UserError(f"target is {target}; expected 3 to 20, which two cards can make")
        super().__init__(target=target, face_cards="ten")

    def deal(self, dice: Dice) -> Position:
        """The second card completes the first to the target: by a product in half of the cases where one can."""
        first = np.array([rank for rank in range(2, 14) if 1 <= self.target - min(rank, 10) <= 10])
        ranks = first[dice.roll(len(first), 1)[:, 0]]
        luck, value = dice.uniform(2), np.minimum(ranks, 10)
        product = (self.target % value == 0) & (self.target // value <= 10) & (luck[:, 0] < 0.5)
        cards = np.stack([ranks, np.where(product, self.target // value, self.target - value)], 1)
        cards = np.where(luck[:, 1:] < 0.5, cards[:, ::-1], cards)
        return self.empty(len(dice)) | {"rank": cards, "suit": dice.roll(4, 2)}


class Points24(Points):
    """Write a formula of four cards that equals the target.

    Args:
        target: what the formula is to equal.
        face_cards: what J, Q and K count: "ten", or their "rank" (11, 12, 13).
        solvable: deal only what has a solution; the paper does not.
    """

    num_cards, operators, room = 4, "+-*/()", 20

    def __init__(self, *, target: int = 24, face_cards: FaceCards = "ten", solvable: bool = False) -> None:
        if not 1 <= target <= 100:
            raise UserError(f"target is {target}; expected 1 to 100")
        super().__init__(target=target, face_cards=face_cards)
        self.solvable = solvable

    def deal(self, dice: Dice) -> Position:
        """Four cards of an endless deck."""
        ranks = deal_hands(dice, 4, self.target if self.solvable else None, self.face_cards)
        return self.empty(len(dice)) | {"rank": ranks, "suit": dice.roll(4, 4)}


def deal_hands(
    dice: Dice, num_cards: int, target: int | None, face_cards: FaceCards, *, needs_face: bool = False
) -> np.ndarray:
    """Ranks [K, num_cards]; with a target only hands that can make it; `needs_face`: one card is J, Q or K."""
    ranks, missing = np.zeros((len(dice), num_cards), np.int64), np.arange(len(dice))
    while len(missing):
        dealt = 1 + dice.of(missing).roll(13, num_cards)
        ranks[missing] = dealt
        bad = np.asarray(~(dealt > 10).any(1) & needs_face)
        if target is not None:
            bad |= [solve(tuple(sorted(hand)), target) is None for hand in values(dealt, face_cards).tolist()]
        missing = missing[bad]
    return ranks


class PointsPlayer(Player):
    """What the players of both share."""

    game: type[Points]

    def play(self, state: np.ndarray) -> np.ndarray:
        """The next word of the solution, if what is written is its beginning."""
        return np.array([self._next(row.tolist()) for row in state])

    def _next(self, row: list[int]) -> int:
        face_cards: FaceCards = "rank" if row[0] else "ten"
        words = self._words(face_cards)
        written = [word for word in row[2 : 3 + self.game.room] if word]
        hand = values(np.array(row[3 + self.game.room :]), face_cards)
        operators = self.game.operators.replace("(", "").replace(")", "")
        solution = [*(solve(tuple(sorted(hand.tolist())), row[1], operators) or ()), "="]
        begun = [words.index(word) + 1 for word in solution[: len(written)]] == written
        return words.index(solution[len(written)] if begun and len(written) < len(solution) else "=")

    def _words(self, face_cards: FaceCards) -> list[str]:
        numbers = [str(number) for number in range(1, 11 if face_cards == "ten" else 14)]
        return [*numbers, *self.game.operators, "="]

    def choices(self, state: np.ndarray) -> int:
        """All words."""
        return len(self._words("rank" if state[0, 0] else "ten"))


@register("demonstrator", "ez_points", "embodied_rft/EZPoints-v0")
class EZPointsPlayer(PointsPlayer):
    """Finds a formula of two cards and writes it word by word.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    game = EZPoints


@register("demonstrator", "points_24", "embodied_rft/Points24-v0")
class Points24Player(PointsPlayer):
    """Finds a formula of four cards and writes it word by word; what cannot be solved it ends at once.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    game = Points24
