"""Messages of a conversation to token ids that are only ever appended.

A conversation is a first message, a reply, what comes next, a reply, ...; the replies' ids are those that were drawn,
and never written again. What lies between them is taken from the tokenizer's chat template, which is asked once for
each message; one that writes earlier messages differently later on is refused. Templates that drop the thoughts of
earlier turns (Qwen 3, DeepSeek R1) would change what was drawn: here thoughts stay.

Boundary: texts in, ids out; knows no model.
"""

from __future__ import annotations

import datetime
import functools
import os.path
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
TODAY = datetime.date(2024, 7, 26)  # of templates that write a date: what was said must read the same tomorrow
CLOCK = "{{%- macro strftime_now(format) -%}}{{{{ format {} }}}}{{%- endmacro %}}".format(
    " ".join(f"| replace('%{part}', '{TODAY.strftime('%' + part)}')" for part in "aAbBdmyYjHIMSp")
)


class Message(NamedTuple):
    """One message of a conversation: Message("user", "what is that?", 1)."""

    role: str
    text: str
    pictures: int = 0  # come before its text


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
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        hidden = [*sorted(special, key=len, reverse=True), "\ue000", "\ue001"]
        self._special = re.compile("|".join(map(re.escape, hidden)))
        shown = () if places is None else (places.token, places.layout.before, places.layout.after)
        self._picture = re.compile("|".join(re.escape(token) for token in (*shown, "\ue000", "\ue001") if token))
        self._parts = places is not None  # messages are lists of parts for the template, or texts
        self.first = functools.lru_cache(maxsize=65_536)(self._first)
        self.following = functools.lru_cache(maxsize=65_536)(self._following)
        self.reply = functools.lru_cache(maxsize=65_536)(self._reply)
        if kind == "chat":  # a template that refuses is refused now
            template = str(tokenizer.get_chat_template())
            self._template = (CLOCK if "strftime_now" in template else "") + template
            self._choose_form()
            self.first(write_chat([{"role": "user", "content": "?"}]) if chats else "?")

    def _first(self, message: str, pictures: int = 0) -> np.ndarray:
        """Ids of the first message; one id stands for each picture, which come before its text."""
        _check(message)
        if self.kind == "chat":
            return self._encode(*self._render(self._messages(message, pictures, first=True)), pictures)
        return self._plain(message, pictures, first=True)

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
        _, rest, texts = self._after_reply(self._messages(message, pictures))
        ids = self._encode(rest, texts, pictures)
        if not len(ids) or ids[0] != self.end:
            raise UserError(
                f"the tokenizer's chat template goes on after a reply with {rest!r:.60}, not with the "
                f"token that ends one ({self.tokenizer.convert_ids_to_tokens(self.end)!r}), so a conversation of many "
                'turns would not be what the model was trained on. Use prompt "plain", or mend the template'
            )
        return ids[1:] if ended else ids

    def _after_reply(self, messages: list[Message]) -> tuple[str, str, list[str]]:
        """What the template writes before a reply and its first word, and behind it with further messages.

        What is read before a reply is how the whole begins, but that a prompt for a reply may open a thought, which
        stays, as thoughts do (DeepSeek: <think>), and that a blank may be left to the reply (Mistral: [/INST] reply).
        """
        before = [] if self.system is None else [Message("system", self.system)]
        before.append(Message("user", ASKED))
        asked, _ = self._render(before)
        whole, texts = self._render([*before, Message("assistant", SAID), *messages])
        rest = whole[len(os.path.commonprefix([asked, whole])) :]  # noqa: RUF071
        blank = rest[: len(rest) - len(rest.lstrip())]
        if not rest.startswith(blank + SAID):
            raise UserError(
                "the tokenizer's chat template writes a conversation otherwise once it goes on (earlier turns change, "
                "or are merged), so what was trained would not be what was said: "
                f'{asked!r:.200} is no beginning of {whole!r:.300}. Use prompt "plain", or mend the template'
            )
        return blank, rest[len(blank + SAID) :], texts

    @functools.cached_property
    def _blank(self) -> str:
        """What a given reply begins with, as the template has it."""
        if self.kind == "plain":
            return ""
        try:
            return self._after_reply([Message("user", ASKED)])[0]
        except UserError:  # said where it matters: when a conversation goes on
            return ""

    def _reply(self, text: str) -> np.ndarray:
        """Ids of a given reply, and its end."""
        _check(text)
        end = str(self.tokenizer.convert_ids_to_tokens(self.end))
        first, *ids = self._tokens(end + self._blank + text)  # some tokenizers write a blank where a text begins
        return _frozen([*(ids if first == self.end else self._tokens(self._blank + text)), self.end])

    def _messages(self, message: str, pictures: int, *, first: bool = False) -> list[Message]:
        said = read_chat(message) if self.chats else [{"role": "user", "content": message}]
        chat = [Message(one["role"], one["content"]) for one in said]
        chat[-1] = chat[-1]._replace(pictures=pictures)
        if first and self.system is not None and chat[0].role != "system":
            chat = [Message("system", self.system), *chat]
        return chat

    def _choose_form(self) -> None:
        """Some templates take lists of parts, some texts, and some lose what comes in the other form without a word."""
        asked, wrong = Message("user", ASKED, int(self.pictures is not None)), []
        for parts in (self._parts, not self._parts):
            self._parts = parts
            try:
                shown, _ = self._render([asked])
                self._encode(shown, [], asked.pictures)
                if ASKED in shown:
                    return
                wrong.append(UserError(f"the tokenizer's chat template leaves out what is said: {shown!r:.200}"))
            except UserError as error:
                wrong.append(error)
        raise wrong[0]

    def _content(self, message: Message, text: str) -> Any:
        if self._parts:
            return [{"type": "image"}] * message.pictures + [{"type": "text", "text": text}]
        return (self.pictures.token + "\n" if self.pictures else "") * message.pictures + text

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[str]]:
        """The template with these messages, whose texts cannot pass for special tokens, and what they would have been.

        A game or a page may well show what a model once wrote.
        """
        texts: list[str] = []
        chat = [{"role": m.role, "content": self._content(m, _hidden(self._special, m.text, texts))} for m in messages]
        try:
            shown = self.tokenizer.apply_chat_template(
                chat, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates are programs, and some refuse a system message
            raise UserError(
                f"the tokenizer's chat template refuses {', '.join(m.role for m in messages)} messages "
                f'({error}): {"drop the option system, or " if self.system else ""}use prompt "plain"'
            ) from error
        return str(shown), texts

    def _plain(self, message: str, pictures: int, *, first: bool) -> np.ndarray:
        if self.pictures is not None:
            texts: list[str] = []
            said = _hidden(self._picture, message, texts)
            return self._encode(self.pictures.before_text(pictures) + said, texts, pictures)
        ids = self.tokenizer(message, add_special_tokens=first)["input_ids"]
        if first:  # begins as the tokenizer begins a text, but does not end
            eos = self.tokenizer.eos_token_id
            ids = ids[:-1] if ids and ids[-1] == eos and not message.endswith(str(self.tokenizer.eos_token)) else ids
            ids = ids or [i for i in (self.tokenizer.bos_token_id,) if i is not None]
        return _frozen(ids)

    def _encode(self, text: str, texts: Sequence[str], pictures: int) -> np.ndarray:
        """Ids of what a template made; what looks like a special token in a message is no such token."""
        if self.pictures is not None and self.kind == "chat":
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
        """Ids of a text; of one that is `special` in its looks only, no id of an added token."""
        if special:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        if len(text) > 1 and not self.tokenizer.added_tokens_decoder.keys().isdisjoint(ids):
            return self._tokens(text[:1], special=False) + self._tokens(text[1:], special=False)
        return ids


def _hidden(what: re.Pattern[str], text: str, texts: list[str]) -> str:
    """A text with marks in place of what must not be read as it looks, which goes to `texts`."""

    def hide(match: re.Match[str]) -> str:
        texts.append(match[0])
        return MARK.format(len(texts) - 1)

    return what.sub(hide, text)


def _check(text: str) -> None:
    if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
        raise UserError(f"{text!r:.60} is no text: a str of valid Unicode is expected")


def _frozen(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    array.flags.writeable = False
    return array
