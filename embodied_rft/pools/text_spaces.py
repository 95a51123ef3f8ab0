"""Spaces of texts: any string, and chats, which are lists of messages written as one string.

A buffer keeps both alike; whoever reads a prompt asks the space which one it is. Boundary: knows no model, no template.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence

from gymnasium import spaces

from embodied_rft.names import UserError

LONGEST_SAMPLE = 32  # characters: short enough for any model, of a space that allows whole books
Message = dict[str, str]


class AnyText(spaces.Text):
    """Any string of at most `max_length` characters: models write whatever they like. Samples are short and ASCII."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length, min_length=0, charset=string.ascii_letters + string.digits + " +-*/=.,")

    def contains(self, x: object) -> bool:
        """Whether it is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: object = None, probability: object = None) -> str:
        """At least one character, at most `LONGEST_SAMPLE`."""
        length = int(self.np_random.integers(1, min(LONGEST_SAMPLE, self.max_length) + 1))
        return "".join(self.np_random.choice(list(self.character_set), size=length))


class ChatText(AnyText):
    """A list of messages, as `write_chat` writes it: ChatText(999).contains('[{"role": "user", "content": "Hi"}]')."""

    def contains(self, x: object) -> bool:
        """Whether it is a chat."""
        try:
            return isinstance(x, str) and super().contains(x) and bool(read_chat(x))
        except ValueError:
            return False

    def sample(self, mask: object = None, probability: object = None) -> str:
        """One message of the user."""
        return write_chat([{"role": "user", "content": super().sample()}])


def check_messages(messages: object) -> list[Message]:
    """A chat that a model may be asked to go on with.

    Raises:
        ValueError: it is no list of messages with a role and a content, or the model's own message comes last.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f'{messages!r:.60} is no chat: a list like [{{"role": "user", "content": "Hi"}}] is expected')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise UserError(f"message {number} is {message!r:.60}; expected an object with role and content, no more")
        if not all(isinstance(part, str) for part in message.values()) or not message["role"]:
            raise UserError(f"message {number} is {message!r:.60}; role and content must be texts, the role not empty")
    if messages[-1]["role"] == "assistant":
        raise UserError("the last message is the assistant's, so there is nothing to reply to: end with another one")
    return [dict(message) for message in messages]


def write_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """A checked list of messages as one string."""
    return json.dumps(check_messages(messages), ensure_ascii=False)


def read_chat(text: str) -> list[Message]:
    """The messages of `write_chat`; ValueError for any other string."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = text
    return check_messages(content)
