"""One decision of a game outside of any environment."""

import numpy as np

from embodied_rft.envs.games.game import Dice


def dice(count, seed=0):
    keys = np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64)
    return Dice(keys, np.zeros(count, np.uint64), np.arange(count))


def move(game, now, actions, rolls=None):
    """(reward, over, success, valid) of one decision, all lists."""
    actions = np.asarray(actions)
    valid = game.valid(now, actions)
    moves = game.move(now, actions, valid, rolls or dice(len(actions)))
    return moves.reward.tolist(), moves.over.tolist(), moves.success.tolist(), valid.tolist()


def write(game, now, words):
    """Rewards of words that are written one after the other, and whether the last one solved it."""
    told = [move(game, now, [game.words[0].index(word)]) for word in words.split()]
    return [each[0][0] for each in told], told[-1][1][0], told[-1][2][0]
