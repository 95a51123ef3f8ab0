"""Words of actions: which one an answer names, whatever its capitals and punctuation.

Boundary: pure functions of text; knows no environment. An action is one word for each of its choices: C choices, the
words of choice i are `words[i]`; an empty word says nothing, and may be left out at the end.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import regex

from embodied_rft.names import UserError

Words = tuple[tuple[str, ...], ...]  # of each choice
SEPARATORS = regex.compile(r"[\s,;]+")
AROUND = "\"'`*_()[]{}<>.,;:!?\u3002\uff0c\uff01\uff1f\u201c\u201d\u2018\u2019\u00ab\u00bb"


class Vocabulary:
    """The words of an action: Vocabulary((("left", "right"),)).read(" Left.") == (0,).

    Args:
        words: of each choice.
        ignore_case: whether capitals matter not, where two words do not differ by them only.
        ignore_punctuation: whether quotes, brackets and stops around a word matter not.

    Raises:
        ValueError: a choice has no word, one of them twice, or one that cannot be told from two.
    """

    def __init__(self, words: Words, *, ignore_case: bool = True, ignore_punctuation: bool = True) -> None:
        self.words, self.ignore_case, self.ignore_punctuation = words, ignore_case, ignore_punctuation
        for choice in words:
            if not choice or len(set(choice)) < len(choice):
                raise UserError(f"the words of an action are {list(choice)}; expected at least one, each once")
            split = [word for word in choice if word != word.strip() or (len(words) > 1 and SEPARATORS.search(word))]
            if split:
                raise UserError(
                    f"the word {split[0]!r} cannot be read: a word has no blanks around it and, where an action is of "
                    f"{len(words)} words, neither blanks nor commas inside it"
                )
        self.exact = [{word: index for index, word in enumerate(choice)} for choice in words]
        self.folded = [_unambiguous(choice) for choice in words]

    def say(self, chosen: Sequence[int]) -> str:
        """An action in words: "left", or "0 1 0 2"."""
        return " ".join(choice[index] for choice, index in zip(self.words, chosen, strict=True)).strip()

    def read(self, text: str) -> tuple[int, ...] | None:
        """The number of the word of each choice, [C]; None: the text names no action."""
        parts = [text.strip()] if len(self.words) == 1 else [part for part in SEPARATORS.split(text) if part]
        if len(parts) > len(self.words):
            return None
        parts += [""] * (len(self.words) - len(parts))
        found = [self._index(choice, part) for choice, part in enumerate(parts)]
        return None if None in found else tuple(index for index in found if index is not None)

    def _index(self, choice: int, part: str) -> int | None:
        exact, folded = self.exact[choice], self.folded[choice]
        for bare in (part, part.strip(AROUND + " \n\t")) if self.ignore_punctuation and part else (part,):
            if bare in exact:
                return exact[bare]
            if self.ignore_case and bare.casefold() in folded:
                return folded[bare.casefold()]
        return None

    def last(self, text: str) -> tuple[int, int] | None:
        """Where an action is named for the last time in a text, as words of their own on one line."""
        found = self._pattern.search(text)
        return None if found is None else found.span()

    @functools.cached_property
    def _pattern(self) -> regex.Pattern[str]:
        parts = []
        for choice in self.words:
            if "" in choice and len(self.words) > 1:
                raise UserError(
                    "actions of several words, some of which may be left out, are not found in the middle of a text: "
                    "let the parser be strict, or take one with tags"
                )
            longest = sorted((word for word in choice if word), key=len, reverse=True)
            bounded = _bounded if self.ignore_punctuation else _alone
            parts.append("|".join(map(bounded, longest)))
        flags = regex.REVERSE | (regex.IGNORECASE if self.ignore_case else 0)
        return regex.compile(r"[ \t,;]+".join(f"(?:{part})" for part in parts), flags)


@functools.lru_cache(maxsize=256)
def vocabulary(words: Words, ignore_case: bool, ignore_punctuation: bool) -> Vocabulary:
    """A `Vocabulary`, made once."""
    return Vocabulary(words, ignore_case=ignore_case, ignore_punctuation=ignore_punctuation)


def _unambiguous(choice: Sequence[str]) -> dict[str, int]:
    counts = Counter(word.casefold() for word in choice)
    return {word.casefold(): index for index, word in enumerate(choice) if counts[word.casefold()] == 1}


def _alone(word: str) -> str:
    """A pattern of a word between blanks."""
    return rf"(?<!\S){regex.escape(word)}(?!\S)"


def _bounded(word: str) -> str:
    """A pattern of a word that is no part of another one."""
    head, tail = (r"\w" if part.isalnum() or part == "_" else "" for part in (word[0], word[-1]))
    number = r"[\w.+-]" if word[0].isdigit() else head  # 5 is not named by 15, -5 or 0.5
    before, after = f"(?<!{number})" if number else "", f"(?!{tail})" if tail else ""
    after += r"(?!\.\d)" if word[-1].isdigit() else ""
    return f"{before}{regex.escape(word)}{after}"
