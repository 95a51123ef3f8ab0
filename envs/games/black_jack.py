"""BlackJack: come closer to 21 than the dealer, not over it (Zhai et al. 2024, RL4VLM; Sutton & Barto 2018, ex. 5.1).

An endless deck; J, Q and K count 10, an ace 11 unless that is too much. "hit" takes a card, over 21 is lost (-1);
"stand" lets the dealer draw until he has `dealer_stands` points and ends the episode: 1 for more points than the
dealer, 0 for as many, -1 for less. No move is invalid.
"""

from __future__ import annotations

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Player, Position
from embodied_rft.names import UserError
from embodied_rft.registry import register

ROOM = 22  # cards of a hand; 21 aces are 21
SHOWN = 10  # are drawn, five in a line


def total(cards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of hands [K, cards] of card numbers (0: no card), and whether an ace counts 11."""
    ranks = np.where(cards > 0, (cards - 1) % 13 + 1, 0)
    hard = np.minimum(ranks, 10).sum(1)
    usable = (ranks == 1).any(1) & (hard <= 11)
    return hard + 10 * usable, usable


class BlackJack(Game):
    """Come closer to 21 than the dealer without going over it.

    Args:
        natural: an ace and a ten that win pay 1.5.
        dealer_stands: the dealer draws below this; up to 19, more is harder.
    """

    words = (("stand", "hit"),)
    sizes = (32, 11, 2)

    def __init__(self, *, natural: bool = False, dealer_stands: int = 17) -> None:
        if not 2 <= dealer_stands <= 21:
            raise UserError(f"dealer_stands is {dealer_stands}; expected 2 to 21")
        self.natural, self.dealer_stands = natural, dealer_stands
        self.arrays = {"player": (ROOM,), "dealer": (ROOM,)}
        self.rules = (
            "Come closer to 21 than the dealer without going over it. J, Q and K count 10, an ace 11 or 1. "
            f"hit takes a card; stand lets the dealer draw to {dealer_stands} and ends the game."
        )
        self.background = drawing.canvas(1, 124, 116, drawing.TABLE)
        for top, words in ((4, "DEALER"), (50, "PLAYER")):
            label = drawing.text(words, color=drawing.WHITE, background=drawing.TABLE)
            drawing.put(self.background, label, top, 5)

    def deal(self, dice: Dice) -> Position:
        """Two cards each; of the dealer's, the first lies open."""
        now = self.empty(len(dice))
        cards = 1 + dice.roll(52, 4)
        now["player"][:, :2], now["dealer"][:, :2] = cards[:, :2], cards[:, 2:]
        return now

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Always."""
        return np.ones(len(actions), bool)

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """A card, or the dealer's turn."""
        _take(now["player"], np.flatnonzero(actions == 1), dice)
        stands = np.flatnonzero(actions == 0)
        while len(draws := stands[total(now["dealer"][stands])[0] < self.dealer_stands]):
            _take(now["dealer"], draws, dice)
        points, dealer = total(now["player"])[0], total(now["dealer"])[0]
        bust = points > 21
        reward = np.sign(points - np.where(dealer > 21, 0, dealer)).astype(float)
        reward = np.where(bust, -1.0, np.where(actions == 0, reward, 0.0))
        if self.natural:
            reward[(reward > 0) & (points == 21) & (now["player"][:, 2] == 0)] = 1.5
        return Moves(reward, bust | (actions == 0), reward > 0)

    def symbols(self, now: Position) -> np.ndarray:
        """Points of the player, the dealer's open card (1 to 10, 0: none), whether an ace counts 11."""
        points, usable = total(now["player"])
        open_card = np.where(now["dealer"][:, 0] > 0, np.minimum((now["dealer"][:, 0] - 1) % 13 + 1, 10), 0)
        return np.stack([np.minimum(points, 31), open_card, usable], 1)

    def draw(self, now: Position) -> np.ndarray:
        """Both hands on a table, [K, 124, 116, 3]; the dealer's second card lies on its face."""
        pictures, deck = self.background.repeat(len(now["player"]), 0), drawing.deck()
        drawing.put(pictures, deck[now["dealer"][:, 0] - 1], 14, 5)
        drawing.put(pictures, deck[52], 14, 27)
        for i in range(SHOWN):
            card = now["player"][:, i] - 1  # -1: an empty place, the last of the deck
            drawing.put(pictures, deck[card], 60 + 30 * (i // 5), 5 + 22 * (i % 5))
        return pictures

    def tell(self, now: Position) -> str:
        """Both hands."""
        hand = ", ".join(_name(card) for card in now["player"][0] if card)
        return f"Dealer: {_name(now['dealer'][0, 0])}, hidden\nYou: {hand}"


def _take(hands: np.ndarray, rows: np.ndarray, dice: Dice) -> None:
    """One card more for some hands."""
    if len(rows):
        hands[rows, (hands[rows] > 0).sum(1)] = 1 + dice.of(rows).roll(52, 1)[:, 0]


def _name(card: int) -> str:
    return drawing.RANKS[(card - 1) % 13]


@register("demonstrator", "black_jack", "embodied_rft/BlackJack-v0")
class BlackJackPlayer(Player):
    """The best play against a dealer who stands on 17 (Sutton & Barto 2018, fig. 5.2).

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """Hit below a number of points that depends on the dealer's card and the ace."""
        points, dealer, usable = state.T
        strong = (dealer >= 7) | (dealer == 1)
        hard = np.where(strong, 17, np.where((dealer >= 4), 12, 13))
        soft = np.where((dealer >= 9) | (dealer == 1), 19, 18)
        return (points < np.where(usable == 1, soft, hard)).astype(np.int64)

    def choices(self, state: np.ndarray) -> int:
        """Stand and hit."""
        return 2
