"""Messages of a conversation to token ids that are only ever appended.

A conversation is a first message, a reply, what comes next, a reply, ...; the replies' ids are those that were drawn,
and never written again. What lies between them is taken from the tokenizer's chat template, which is asked once for
each message; one that writes earlier turns differently later on is refused.

Boundary: texts in, ids out; knows no model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embodied_rft.agents.models.processing import Places
from embodied_rft.names import UserError
from embodied_rft.pools.text_spaces import read_chat, write_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["chat", "plain"]
ASKED, SAID = "question", "reply"  # a turn before, whatever it was
MARK = "\ue000{}\ue001"  # stands for a text that looks like a special token, while a template is filled in
MARKS = re.compile("\ue000([0-9]+)\ue001")


class Dialogue:
    """What is read before each reply.

    Args:
        tokenizer: a fast tokenizer.
        kind: "chat": user messages through the chat template; "plain": texts as they are, one behind the other.
        end: the token that ends a reply.
        system: a system message at the beginning, where a chat brings none of its own.
        chats: messages are lists of messages, as `text_spaces.write_chat` writes them.
        places: of pictures in a prompt; None: the model sees none.

    Raises:
        ValueError: there is no chat template, or it refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        kind: Kind,
        *,
        end: int,
        system: str | None = None,
        chats: bool = False,
        places: Places | None = None,
    ) -> None:
        if kind == "chat" and not tokenizer.chat_template:
            raise UserError('the tokenizer has no chat template: use prompt "plain", or a checkpoint that has one')
        self.tokenizer, self.kind, self.end, self.system, self.chats = tokenizer, kind, end, system, chats
        self.pictures = places
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.first = functools.lru_cache(maxsize=65_536)(self._first)
        self.following = functools.lru_cache(maxsize=65_536)(self._following)
        self.reply = functools.lru_cache(maxsize=65_536)(self._reply)
        if kind == "chat":  # a template that refuses is refused now
            self.first(write_chat([{"role": "user", "content": "?"}]) if chats else "?")

    def _first(self, message: str, pictures: int = 0) -> np.ndarray:
        """Ids of the first message; one id stands for each picture, which come before its text."""
        _check(message)
        if self.kind == "chat":
            ids = self._encode(*self._filled(self._messages(message, pictures, first=True)), pictures)
        else:
            ids = self._plain(message, pictures, first=True)
        if not len(ids):
            raise UserError("an empty prompt was given to a model without a begin token: there is nothing to continue")
        return ids

    def _following(self, message: str, pictures: int = 0, *, ended: bool = True) -> np.ndarray:
        """Ids of a later message.

        Args:
            message: its text.
            pictures: how many come before it.
            ended: whether the reply before it ended with `end`; else that is written here.
        """
        _check(message)
        if self.kind == "plain":
            ids = self._plain(message, pictures, first=False)
            return ids if ended else _frozen([self.end, *ids])
        before = [{"role": "user", "content": self._content(ASKED, 0)}]
        if self.system is not None:
            before = [{"role": "system", "content": self._content(self.system, 0)}, *before]
        head = self._render(before) + SAID
        turn = [*before, {"role": "assistant", "content": self._content(SAID, 0)}]
        whole, texts = self._filled([*turn, *self._messages(message, pictures, first=False)])
        if not whole.startswith(head):
            raise UserError(
                "the tokenizer's chat template writes a conversation otherwise once it goes on (earlier turns change, "
                "or are merged), so what was trained would not be what was said: "
                f'{head!r:.200} is no beginning of {whole!r:.300}. Use prompt "plain", or mend the template'
            )
        ids = self._encode(whole[len(head) :], texts, pictures)
        if not len(ids) or ids[0] != self.end:
            raise UserError(
                f"the tokenizer's chat template goes on after a reply with {whole[len(head) :]!r:.60}, not with the "
                f"token that ends one ({self.tokenizer.convert_ids_to_tokens(self.end)!r}), so a conversation of many "
                'turns would not be what the model was trained on. Use prompt "plain", or mend the template'
            )
        return ids[1:] if ended else ids

    def _reply(self, text: str) -> np.ndarray:
        """Ids of a given reply, and its end."""
        _check(text)
        return _frozen([*self._tokens(text), self.end])

    def _messages(self, message: str, pictures: int, *, first: bool) -> list[dict[str, Any]]:
        chat: Sequence[Mapping[str, str]] = read_chat(message) if self.chats else [{"role": "user", "content": message}]
        if first and self.system is not None and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": self.system}, *chat]
        last = len(chat) - 1
        return [
            {**one, "content": self._content(one["content"], pictures if i == last else 0)}
            for i, one in enumerate(chat)
        ]

    def _content(self, text: str, pictures: int) -> Any:
        """What a template is given: lists of parts where the model sees, texts else."""
        if self.pictures is None:
            return text
        return [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]

    def _filled(self, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
        """The template with these messages, whose texts cannot pass for special tokens, and what they would have been.

        A game or a page may well show what a model once wrote.
        """
        texts: list[str] = []

        def hide(match: re.Match[str]) -> str:
            texts.append(match[0])
            return MARK.format(len(texts) - 1)

        def clean(content: Any) -> Any:
            if isinstance(content, str):
                return self._special.sub(hide, content)
            return [part | {"text": clean(part["text"])} if "text" in part else part for part in content]

        return self._render([{**one, "content": clean(one["content"])} for one in messages]), texts

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates are programs, and some refuse a system message
            raise UserError(
                f"the tokenizer's chat template refuses {', '.join(m['role'] for m in messages)} messages "
                f'({error}): {"drop the option system, or " if self.system else ""}use prompt "plain"'
            ) from error

    def _plain(self, message: str, pictures: int, *, first: bool) -> np.ndarray:
        if self.pictures is not None:
            hidden = message.replace(self.pictures.token, MARK.format(0))
            return self._encode(self.pictures.before_text(pictures) + hidden, [self.pictures.token], pictures)
        ids = self.tokenizer(message, add_special_tokens=first)["input_ids"]
        if first:  # begins as the tokenizer begins a text, but does not end
            eos = self.tokenizer.eos_token_id
            ids = ids[:-1] if ids and ids[-1] == eos and not message.endswith(str(self.tokenizer.eos_token)) else ids
            ids = ids or [i for i in (self.tokenizer.bos_token_id,) if i is not None]
        return _frozen(ids)

    def _encode(self, text: str, texts: Sequence[str], pictures: int) -> np.ndarray:
        """Ids of what a template made; what looks like a special token in a message is no such token."""
        if self.pictures is not None:
            text = self.pictures.around(text)
        ids: list[int] = []
        for number, part in enumerate(MARKS.split(text) if texts else [text]):
            ids += self._tokens(texts[int(part)], special=False) if number % 2 else self._tokens(part)
        if self.pictures is not None and (places := ids.count(self.pictures.id)) != pictures:
            raise UserError(
                f"the prompt has {places} places for {pictures} pictures: {text!r:.200}. "
                + ('The chat template writes none: use prompt "plain"' if self.kind == "chat" else "")
            )
        return _frozen(ids)

    def _tokens(self, text: str, *, special: bool = True) -> list[int]:
        if special:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _check(text: str) -> None:
    if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
        raise UserError(f"{text!r:.60} is no text: a str of valid Unicode is expected")


def _frozen(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    array.flags.writeable = False
    return array
