"""Pictures of games out of NumPy alone: a bitmap font, cards, boards. The same bytes on every machine.

Boundary: arrays in, uint8 pictures [..., H, W, 3] out; knows no game. Legend: K pictures, c pixels a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

Color = tuple[int, int, int]
BLACK, WHITE, RED, TABLE = (0, 0, 0), (255, 255, 255), (200, 20, 30), (53, 101, 77)
SUITS = "shdc"  # spades, hearts, diamonds, clubs: the last four letters of the font
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")

# Five columns a letter, seven dots each, the lowest bit on top.
_FONT = """
0 3E5149453E  1 00427F4000  2 4261514946  3 2141454B31  4 1814127F10  5 2745454539  6 3C4A494930  7 0171090503
8 3649494936  9 064949291E  A 7E1111117E  B 7F49494936  C 3E41414122  D 7F4141221C  E 7F49494941  F 7F09090901
G 3E4149497A  H 7F0808087F  I 00417F4100  J 2040413F01  K 7F08142241  L 7F40404040  M 7F020C027F  N 7F0408107F
O 3E4141413E  P 7F09090906  Q 3E4151215E  R 7F09192946  S 4649494931  T 01017F0101  U 3F4040403F  V 1F2040201F
W 3F4038403F  X 6314081463  Y 0708700807  Z 6151494543  + 08083E0808  - 0808080808  * 14083E0814  / 2010080402
( 001C224100  ) 0041221C00  = 1414141414  ? 0201510906  : 0036360000  s 0C4E7F4E0C  h 0E1F3E1F0E  d 081C3E1C08
c 185A7F5A18
"""


@cache
def _glyphs() -> dict[str, np.ndarray]:
    """Letter to its dots [7, 5] bool."""
    words = _FONT.split()
    found = {" ": np.zeros((7, 5), bool)}
    for letter, code in zip(words[::2], words[1::2]):
        columns = np.frombuffer(bytes.fromhex(code), np.uint8)
        found[letter] = (columns >> np.arange(7)[:, None] & 1).astype(bool)
    return found


def text(words: str, *, scale: int = 1, color: Color = BLACK, background: Color = WHITE) -> np.ndarray:
    """A line of text [7 * scale, 6 * scale * letters, 3]; letters have one size, small `shdc` are the suits."""
    dots = np.concatenate([np.pad(_glyphs()[letter], ((0, 0), (0, 1))) for letter in words], axis=1)
    return np.where(dots.repeat(scale, 0).repeat(scale, 1)[..., None], color, background).astype(np.uint8)


def canvas(count: int, height: int, width: int, color: Color = WHITE) -> np.ndarray:
    """Empty pictures [K, height, width, 3]."""
    return np.full((count, height, width, 3), color, np.uint8)


def put(pictures: np.ndarray, sprites: np.ndarray, y: int, x: int) -> None:
    """Draw one sprite [h, w, 3], or one for each picture [K, h, w, 3], with its upper left corner at (y, x)."""
    height, width = sprites.shape[-3:-1]
    pictures[:, y : y + height, x : x + width] = sprites


def labels(words: Sequence[str], **style: int | Color) -> np.ndarray:
    """Sprites of texts [count, h, w, 3], all as wide as the longest."""
    longest = max(map(len, words))
    return np.stack([text(word.ljust(longest), **style) for word in words])  # type: ignore[arg-type]


def block(size: int, color: Color, *, edge: Color | None = None, mark: str = "", ink: Color = BLACK) -> np.ndarray:
    """One square of a board [c, c, 3], with an edge of one pixel and a mark in its middle."""
    square = np.full((size, size, 3), color, np.uint8)
    if edge is not None:
        square[[0, -1]], square[:, [0, -1]] = edge, edge
    if mark:
        scale = max(1, min((size - 4) // 7, (size - 2) // (6 * len(mark))))
        written = text(mark, scale=scale, color=ink, background=color)[:, :-scale]
        y, x = (size - written.shape[0]) // 2, (size - written.shape[1]) // 2
        square[y : y + written.shape[0], x : x + written.shape[1]] = written
    return square


def shape(
    name: str, size: int, color: Color, background: Color = WHITE, *, edge: Color | None = (200, 200, 200)
) -> np.ndarray:
    """A square of a board with a figure in it [c, c, 3]: circle, square, triangle, diamond, cross or star."""
    y, x = np.mgrid[:size, :size] * 2.0 - (size - 1)
    y, x, half = y / size, x / size, 0.7
    bar = 0.25
    inside = {
        "circle": y**2 + x**2 <= half**2,
        "square": np.maximum(abs(y), abs(x)) <= 0.62,
        "triangle": (abs(x) <= (y + half) / 2) & (y <= half),
        "diamond": abs(y) + abs(x) <= half + 0.05,
        "cross": (np.minimum(abs(y), abs(x)) <= bar) & (np.maximum(abs(y), abs(x)) <= half),
        "star": (abs(abs(y) - abs(x)) <= bar) & (np.maximum(abs(y), abs(x)) <= half),
    }[name]
    square = np.where(inside[..., None], color, background).astype(np.uint8)
    if edge is not None:
        square[[0, -1]], square[:, [0, -1]] = edge, edge
    return square


def board(symbols: np.ndarray, sprites: np.ndarray) -> np.ndarray:
    """Boards of squares: symbols [K, R, C] and what each looks like [kinds, c, c, 3] -> [K, R * c, C * c, 3]."""
    count, rows, columns = symbols.shape
    size = sprites.shape[1]
    squares = sprites[symbols].transpose(0, 1, 3, 2, 4, 5)  # [K, R, c, C, c, 3]
    return squares.reshape(count, rows * size, columns * size, 3)


@cache
def deck() -> np.ndarray:
    """Cards by number, rank - 1 + 13 * suit, and last a card's back and an empty place: [54, 28, 20, 3]."""
    cards = np.full((54, 28, 20, 3), WHITE, np.uint8)
    for suit, name in enumerate(SUITS):
        ink = RED if name in "hd" else BLACK
        for rank, letters in enumerate(RANKS):
            card = cards[13 * suit + rank]
            card[3:10, 3 : 3 + 6 * len(letters)] = text(letters, color=ink)
            card[17:24, 10:16] = text(name, color=ink)
    cards[52] = np.where((np.indices((28, 20)).sum(0) % 4 < 2)[..., None], (40, 60, 150), (220, 220, 240))
    cards[:, [0, -1]], cards[:, :, [0, -1]] = (90, 90, 90), (90, 90, 90)
    cards[53] = TABLE
    return cards
