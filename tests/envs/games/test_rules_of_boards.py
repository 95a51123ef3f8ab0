"""Boards and mazes: their rules against slow, plain ones, Gymnasium's where it has the game, or cases by hand."""

import itertools
from collections import Counter, deque

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from embodied_rft.envs.games import shisen_sho, sokoban, swap
from embodied_rft.envs.games.frozen_lake import HOLE, ICE, FrozenLake, FrozenLakePlayer
from embodied_rft.envs.games.shisen_sho import ShisenSho
from embodied_rft.envs.games.sokoban import Sokoban
from embodied_rft.envs.games.swap import Swap
from embodied_rft.envs.games.twenty_forty_eight import TwentyFortyEight, slide
from tests.envs.games.moves import dice, move
from tests.lab.harness import fails

# --- 2048 ---


def slow_left(row):
    tiles, merged, gained = [k for k in row if k], [], 0
    while tiles:
        first = tiles.pop(0)
        if tiles and tiles[0] == first:
            tiles.pop(0)
            first += 1
            gained += 2**first
        merged.append(first)
    return merged + [0] * (len(row) - len(merged)), gained


def slow_slide(board, side):
    board = np.rot90(board, (side + 1) % 4)
    rows, gained = zip(*(slow_left(row) for row in board.tolist()))
    return np.rot90(np.array(rows), -(side + 1) % 4), sum(gained)


def slides(side_of_numbers=lambda side: side):
    rng = np.random.default_rng(0)
    boards = rng.integers(0, 4, (200, 4, 4)) * (rng.random((200, 4, 4)) < 0.8)
    for side in range(4):
        moved, gained = slide(boards, side_of_numbers(side))
        for before, after, score in zip(boards, moved, gained):
            expected, points = slow_slide(before, side)
            assert np.array_equal(after, expected) and score == points


def test_slides_are_those_of_a_slow_game():
    slides()


def test_slides_to_the_wrong_side_are_not():
    fails(slides, lambda side: (side + 2) % 4)


def test_2048_by_hand():
    up = np.array([[[1, 0], [1, 0]]])
    game = TwentyFortyEight(size=2, goal=8, reward="score")
    now = {"board": up.copy()}
    assert move(game, now, [0]) == ([4], [False], [False], [True]) and now["board"][0, 0, 0] == 2
    assert (now["board"] > 0).sum() == 2  # a new tile
    stuck = {"board": np.array([[[1, 2], [2, 1]]])}
    assert move(game, stuck, [0]) == ([0], [True], [False], [False])
    won = {"board": np.array([[[2, 2], [0, 0]]])}
    assert move(game, won, [3])[:3] == ([8], [True], [True])
    still = {"board": up.copy()}
    assert move(TwentyFortyEight(size=2), still, [3])[0] == [-1] and np.array_equal(still["board"], up)
    assert move(TwentyFortyEight(size=2), {"board": up.copy()}, [2])[0] == [1]


def test_new_tiles_are_twos_nine_times_of_ten():
    board = TwentyFortyEight().deal(dice(2000))["board"]
    assert ((board > 0).sum((1, 2)) == 2).all() and abs((board == 1).sum() / 4000 - 0.9) < 0.02
    assert (abs((board > 0).mean(0) - 1 / 8) < 0.03).all()


# --- Shisen-Sho ---


def slow_joined(board, one, other):
    """Breadth first over (square, heading, turns) on the board with a free border."""
    size = len(board)
    start, goal = (tuple(np.add(divmod(square, size), 1)) for square in (one, other))
    queue, seen = deque((start, side, 0) for side in range(4)), set()
    while queue:
        (row, column), side, turns = queue.popleft()
        row, column = row + (0, 1, 0, -1)[side], column + (1, 0, -1, 0)[side]
        if (row, column) == goal:
            return True
        inside = 1 <= row <= size and 1 <= column <= size
        if not (0 <= row < size + 2 and 0 <= column < size + 2) or (inside and board[row - 1, column - 1]):
            continue
        for new in range(4):
            state = ((row, column), new, turns + (new != side))
            if state[2] <= 2 and state not in seen:
                seen.add(state)
                queue.append(state)
    return False


def lines_join(joined=shisen_sho.joined):
    rng = np.random.default_rng(0)
    for share in (0.3, 0.6, 0.9):
        boards = (rng.random((30, 4, 4)) < share).astype(int)
        for board in boards:
            tiles = np.flatnonzero(board)
            pairs = np.array(list(itertools.combinations(tiles, 2))).reshape(-1, 2)
            if len(pairs):
                ours = joined(board[None], pairs[None, :, 0], pairs[None, :, 1])[0]
                assert ours.tolist() == [slow_joined(board, *pair) for pair in pairs]


def test_lines_of_two_turns_are_those_of_a_slow_search():
    lines_join()


def test_lines_that_may_not_leave_the_board_are_not():
    def inside(board, one, other):
        walled = np.pad(board, ((0, 0), (1, 1), (1, 1)), constant_values=1)
        at = lambda square: (square // 4 + 1) * 6 + square % 4 + 1  # noqa: E731
        return shisen_sho.joined(walled, at(one), at(other))

    fails(lines_join, inside)


def test_shisen_sho_by_hand():
    game = ShisenSho(size=2, colors=1, shapes=1)
    now = game.deal(dice(1))
    assert (now["board"] > 0).all()
    assert move(game, now, [[0, 0, 0, 0]]) == ([-1], [False], [False], [False])  # one tile is no pair
    assert move(game, now, [[0, 0, 1, 1]]) == ([-1], [False], [False], [False])  # three turns
    assert move(game, now, [[0, 0, 0, 1]]) == ([1], [False], [False], [True])
    assert move(game, now, [[0, 0, 1, 0]]) == ([-1], [False], [False], [False])  # an empty square
    assert move(game, now, [[1, 0, 1, 1]]) == ([1], [True], [True], [True])
    lost = {"board": np.array([[[1, 2], [2, 1]]]), "pairs": np.array([[[0, 3], [1, 2]]])}
    assert not game._open(lost["board"], lost["pairs"]).any()


def test_every_kind_lies_four_times():
    board = ShisenSho().deal(dice(20))["board"]
    assert all(sorted(Counter(b.ravel().tolist()).values()) == [4] * 9 for b in board)


# --- Swap ---


def slow_lines(board):
    found, size = np.zeros(board.shape, bool), len(board)
    for row, column in itertools.product(range(size), range(size)):
        for by in ((0, 1), (1, 0)):
            line = [(row + i * by[0], column + i * by[1]) for i in range(3)]
            if line[-1][0] < size and line[-1][1] < size and len({board[square] for square in line}) == 1:
                for square in line:
                    found[square] = True
    return found


def test_lines_are_those_of_a_slow_search():
    boards = np.random.default_rng(0).integers(0, 3, (50, 6, 6))
    assert all(np.array_equal(found, slow_lines(board)) for found, board in zip(swap.lines(boards), boards))
    gains = swap.gains(boards)
    for board, mine in zip(boards[:10], gains):
        for (one, other), gain in zip(swap.swaps(6)[0], mine):
            after = board.copy().ravel()
            after[[one, other]] = after[[other, one]]
            assert slow_lines(after.reshape(6, 6)).sum() == gain


def test_swap_by_hand():
    game = Swap(size=4, kinds=12, goal=100, reward="score")
    board = np.array([[[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 9, 8], [1, 2, 8, 4]]])
    now = {"board": board.copy(), "score": np.array([0])}
    assert move(game, now, [[0, 0, 0, 1]]) == ([-1], [False], [False], [False])
    assert np.array_equal(now["board"], board)
    assert move(game, now, [[0, 0, 1, 0]])[3] == [False]  # no line
    assert move(game, now, [[0, 0, 2, 2]])[3] == [False]  # no neighbours
    reward, over, success, valid = move(game, now, [[2, 2, 3, 2]])
    assert valid == [True] and reward[0] >= 12 and now["score"][0] == reward[0] and over == success == [False]  # 4 * 3
    assert not swap.lines(now["board"]).any() and (swap.gains(now["board"]) > 0).any()
    signs = Swap(size=4, kinds=12, goal=6)
    assert move(signs, {"board": board.copy(), "score": np.array([0])}, [[2, 2, 3, 2]])[:3] == ([1], [True], [True])


def test_tiles_fall_in_their_order():
    game = Swap(size=4, kinds=12)
    board = np.arange(16).reshape(1, 4, 4) % 12
    taken = np.zeros((1, 4, 4), bool)
    taken[0, 2, :3] = taken[0, 1, 0] = True
    fallen = game._fall(board, taken, dice(1))[0]
    assert (
        fallen[2:, 0].tolist() == [0, 0]
        and fallen[1:, 1].tolist() == [1, 5, 1]
        and fallen[:, 3].tolist() == [3, 7, 11, 3]
    )


def test_boards_of_swap_begin_without_a_line_and_with_a_move():
    board = Swap().deal(dice(50))["board"]
    assert not swap.lines(board).any() and (swap.gains(board) > 0).any(1).all()


# --- Sokoban ---


def slow_step(lines, side):
    """A room in signs after a step."""
    squares = {(r, c): sign for r, line in enumerate(lines) for c, sign in enumerate(line)}
    row, column = next(square for square, sign in squares.items() if sign in "PS")
    by = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[side]
    one, two = (row + by[0], column + by[1]), (row + 2 * by[0], column + 2 * by[1])
    if squares[one] in "X*" and squares[two] in "_O":
        squares[two], squares[one] = {"_": "X", "O": "*"}[squares[two]], {"X": "_", "*": "O"}[squares[one]]
    if squares[one] in "_O":
        squares[row, column], squares[one] = (
            {"P": "_", "S": "O"}[squares[row, column]],
            {"_": "P", "O": "S"}[squares[one]],
        )
    return ["".join(squares[r, c] for c in range(len(line))) for r, line in enumerate(lines)]


def test_sokoban_is_a_slow_game():
    game = Sokoban(size=6, boxes=2)
    now, rng = game.deal(dice(10)), np.random.default_rng(0)
    for _ in range(60):
        before = [game.tell({name: value[k : k + 1] for name, value in now.items()}).split("\n") for k in range(10)]
        actions = rng.integers(4, size=10)
        rewards, over, success, valid = move(game, now, actions)
        for k, lines in enumerate(before):
            after = game.tell({name: value[k : k + 1] for name, value in now.items()}).split("\n")
            assert after == slow_step(lines, game.words[0][actions[k]])
            here, there = ("".join(each).count("*") for each in (lines, after))
            assert rewards[k] == pytest.approx(-0.1 + there - here + 10 * (there == 2))
            assert over[k] == success[k] == (there == 2) and valid[k] == (lines != after)


def test_sparse_rewards_of_sokoban():
    dense, sparse = Sokoban(), Sokoban(reward="sparse")
    now = sparse.empty(1)
    now["room"][0, 1, 1:5], now["boxes"][0, 1, 3], now["place"][0] = [1, 1, 1, 2], 1, (1, 2)
    twin = {name: value.copy() for name, value in now.items()}
    assert move(sparse, now, [0])[:3] == ([0], [False], [False]) and move(sparse, now, [2])[0] == [0]
    assert move(sparse, now, [2])[:3] == ([1], [True], [True])
    assert move(dense, twin, [2])[0] == pytest.approx([10.9])


def test_rooms_have_walls_around_as_many_targets_as_boxes_and_none_is_solved():
    for options in ({}, {"size": 7, "boxes": 2}, {"size": 9, "boxes": 3}):
        game = Sokoban(**options)
        now = game.deal(dice(20))
        room, boxes = now["room"], now["boxes"] == 1
        assert (room[:, [0, -1]] == 0).all() and (room[:, :, [0, -1]] == 0).all()
        assert ((room == sokoban.TARGET).sum((1, 2)) == game.boxes).all() and (boxes.sum((1, 2)) == game.boxes).all()
        assert not (boxes & (room != sokoban.FLOOR)).any()


# --- FrozenLake ---


def crosses_like_gymnasium(game):
    now, rng = game.deal(dice(12)), np.random.default_rng(0)
    theirs = []
    for squares in now["map"]:
        desc = ["".join("FHG"[kind] for kind in line) for line in squares]
        theirs.append(FrozenLakeEnv(desc=["S" + desc[0][1:], *desc[1:]], is_slippery=False))
        theirs[-1].reset(seed=0)
    running = np.ones(12, bool)
    for _ in range(40):
        actions = rng.integers(4, size=12)
        rewards, over, _, _ = move(game, now, actions)
        for k in np.flatnonzero(running):
            place, reward, terminated, _, _ = theirs[k].step(int(actions[k]))
            assert (place, reward, terminated) == (now["place"][k] @ [game.size, 1], rewards[k], over[k])
            running[k] = not terminated


def test_frozen_lake_is_gymnasiums():
    crosses_like_gymnasium(FrozenLake(size=5))


def test_a_lake_with_up_and_down_exchanged_is_not():
    class Wrong(FrozenLake):
        def move(self, now, actions, valid, dice):
            return super().move(now, np.array([0, 3, 2, 1])[actions], valid, dice)

    fails(crosses_like_gymnasium, Wrong(size=5))


def test_slippery_ice_slides_to_both_sides_alike():
    game, count = FrozenLake(slip=2 / 3, size=3, ice=1.0), 3000
    now = game.deal(dice(count))
    now["place"][:] = 1
    move(game, now, np.full(count, 2), dice(count, 1))
    shares = [(now["place"] == place).all(1).mean() for place in ([1, 2], [0, 1], [2, 1], [1, 0])]
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.03)


def test_maps_have_a_way_and_as_much_ice_as_was_asked_for():
    maps = FrozenLake(size=4, ice=0.8).deal(dice(500))["map"]
    inner = maps.reshape(500, -1)[:, 1:-1]
    assert 0.8 < (inner == ICE).mean() < 0.88  # those without a way are not there
    assert (inner == HOLE).any(1).mean() > 0.8 and len(np.unique(inner, axis=0)) > 250


def test_value_iteration_beats_the_shortest_way_on_slippery_ice():
    game, count = FrozenLake(slip=2 / 3), 80
    success = []
    for slip in (0.0, 2 / 3):
        now, rolls, done, won = game.deal(dice(count)), dice(count, 1), np.zeros(count, bool), np.zeros(count, bool)
        for _ in range(game.limit):
            actions = FrozenLakePlayer(slip=slip).play(game.symbols(now))
            before = {name: value.copy() for name, value in now.items()}
            moves = game.move(now, actions, game.valid(now, actions), rolls)
            won |= moves.success & ~done
            done |= moves.over
            for name in now:  # who has ended stays
                now[name][done] = np.where(
                    moves.over.reshape(-1, *[1] * (now[name].ndim - 1)), before[name], now[name]
                )[done]
        success.append(won.mean())
    assert success[1] > success[0] + 0.15
