"""GeneralPoints: cards, one formula of them a decision, a verifier that answers (Chu et al. 2025, arXiv:2501.17161).

Reward 5 for a formula that equals the target, which ends the episode; -1 for one of the right numbers with another
value, -2 for other numbers than those of the cards (each once), -3 for what is no formula: both are invalid. What the
verifier said is shown, and after `tries` answers the episode ends. Every hand has a solution.

What the paper varies are options. The rule: J, Q and K count ten in training and 11, 12, 13 out of distribution. The
looks: black suits in training, red ones out of distribution.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Player, Position
from embodied_rft.envs.games.points import FaceCards, deal_hands, read, solve, values
from embodied_rft.names import UserError, nearest
from embodied_rft.registry import register

SUITS = {"black": (0, 3), "red": (1, 2), "mixed": (0, 1, 2, 3)}
LENGTH = 15  # words of an answer; 11 are enough for every solution
WORDS = ("", *(str(number) for number in range(1, 14)), *"+-*/()")
MOST_CARDS = 4
VERDICTS = ("", "wrong value", "wrong numbers", "no formula")
REWARDS = np.array([5.0, -1.0, -2.0, -3.0])


class GeneralPoints(Game):
    """Answer with a formula of all cards that equals the target.

    Args:
        target: what the formula is to equal.
        cards: how many are dealt, 2 to 4; fewer are easier.
        face_cards: the rule: J, Q and K count "ten", or their "rank" (11, 12, 13).
        suits: the looks: "black", "red" or "mixed".
        needs_face: deal only hands in which the rule matters (one card at least is J, Q or K).
        tries: answers before the episode ends; fewer are harder.
    """

    words = (WORDS,) * LENGTH

    def __init__(
        self,
        *,
        target: int = 24,
        cards: int = MOST_CARDS,
        face_cards: FaceCards = "ten",
        suits: str = "mixed",
        needs_face: bool = False,
        tries: int = 5,
    ) -> None:
        if face_cards not in ("ten", "rank"):
            raise UserError(f"face_cards is {face_cards!r}; expected 'ten' (J, Q and K are 10) or 'rank' (11, 12, 13)")
        if suits not in SUITS:
            raise UserError(f"unknown suits {suits!r}; {nearest(suits, SUITS)}")
        if not 1 <= target <= 100 or not 1 <= tries <= 99:
            raise UserError(f"target is {target} and tries {tries}; expected 1 to 100, and 1 to 99")
        if not 2 <= cards <= MOST_CARDS:
            raise UserError(f"cards is {cards}; expected 2 to {MOST_CARDS}")
        self.target, self.face_cards, self.needs_face = target, face_cards, needs_face
        self.cards, self.tries = cards, tries
        self.suits = np.array(SUITS[suits])
        self.arrays = {"rank": (cards,), "suit": (cards,), "left": (), "verdict": ()}
        self.sizes = [2, 101, tries + 1, len(VERDICTS), *[14] * cards]
        self.count = "10" if face_cards == "ten" else "11, 12 and 13"
        self.rules = (
            f"Write a formula that equals {target} and has every card once. J, Q and K count {self.count}. Use "
            "numbers, + - * / and brackets, with blanks between them."
        )
        style = {"color": drawing.WHITE, "background": drawing.TABLE}
        self.verdicts = drawing.labels([verdict.upper() for verdict in VERDICTS], **style)
        self.background = drawing.canvas(1, 52, 114, drawing.TABLE)
        self.counts = drawing.labels([str(left) for left in range(tries + 1)], **style)

    def deal(self, dice: Dice) -> Position:
        """Hands that can make the target."""
        ranks = deal_hands(dice, self.cards, self.target, self.face_cards, needs_face=self.needs_face)
        suit = self.suits[dice.roll(len(self.suits), self.cards)]
        return self.empty(len(dice)) | {"rank": ranks, "suit": suit, "left": np.full(len(dice), self.tries)}

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether an answer is a formula of the right numbers."""
        return self._verdicts(now, actions) < 2

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """The verifier answers."""
        now["verdict"] = self._verdicts(now, actions)
        now["left"] -= 1
        right = now["verdict"] == 0
        return Moves(REWARDS[now["verdict"]], right | (now["left"] == 0), right)

    def _verdicts(self, now: Position, actions: np.ndarray) -> np.ndarray:
        hands = values(now["rank"], self.face_cards).tolist()
        return np.array([self._verdict(hand, self.say(answer)) for hand, answer in zip(hands, actions)])

    def _verdict(self, hand: list[int], answer: str) -> int:
        said = read(answer)
        if said is None:
            return 3
        return 2 if Counter(said[1]) != Counter(hand) else int(said[0] != self.target)

    def say(self, action: np.ndarray) -> str:
        """The formula, without empty words."""
        return " ".join(WORDS[index] for index in action if index)

    def symbols(self, now: Position) -> np.ndarray:
        """What face cards count (0: ten), the target, tries left, what the verifier said, the ranks of the cards."""
        told = np.tile([int(self.face_cards == "rank"), self.target], (len(now["rank"]), 1))
        return np.concatenate([told, now["left"][:, None], now["verdict"][:, None], now["rank"]], 1)

    def draw(self, now: Position) -> np.ndarray:
        """The cards on a table, what the verifier said, and how many tries are left, [K, 52, 114, 3]."""
        pictures = self.background.repeat(len(now["rank"]), 0)
        for i in range(self.cards):
            card = np.where(now["rank"][:, i] > 0, now["rank"][:, i] - 1 + 13 * now["suit"][:, i], 53)
            drawing.put(pictures, drawing.deck()[card], 6, 6 + 27 * i)
        drawing.put(pictures, self.verdicts[now["verdict"]], 40, 6)
        drawing.put(pictures, self.counts[now["left"]], 40, 96)
        return pictures

    def tell(self, now: Position) -> str:
        """Cards, what J, Q and K count, tries left and what the verifier said."""
        cards = ", ".join(drawing.RANKS[rank - 1] for rank in now["rank"][0])
        said = VERDICTS[now["verdict"][0]]
        told = f"Cards: {cards}\nJ, Q, K: {self.count}\nAnswers left: {now['left'][0]}"
        return told + (f"\nThe last answer: {said}" if said else "")


@register("demonstrator", "general_points", "embodied_rft/GeneralPoints-v0")
class GeneralPointsPlayer(Player):
    """Solves the hand.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """Formulas [N, 15]."""
        answers = np.zeros((len(state), LENGTH), np.int64)
        for answer, (rank, target, _, _, *cards) in zip(answers, state.tolist()):
            hand = values(np.array(cards), "rank" if rank else "ten").tolist()
            words = solve(tuple(sorted(hand)), target) or ()
            answer[: len(words)] = [WORDS.index(word) for word in words]
        return answers

    def choices(self, state: np.ndarray) -> np.ndarray:
        """Words of each place."""
        return np.full(LENGTH, len(WORDS))
