"""`language`: a language model that answers in text, and may see pictures. One unit a token of its reply, the end too.

Any Hugging Face decoder or image-text-to-text model, by folder or hub id, or a tiny random one. An episode is a
conversation: each observation holds a new message, what was said before is read from the rows of the episode
(`data.Past`), and the ids of a conversation are only ever appended. What was sampled is what is trained: the trace
holds the reply's ids, and no reply is ever tokenised again to score it. Boundary: texts and pictures in, text out,
log-probabilities of stored ids; knows no reward and no objective. transformers is imported when a policy is made.
Legend: N prompts, B rows, U reply tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.models.causal_lm import CausalLM, load_model
from embodied_rft.agents.models.dialogue import Dialogue
from embodied_rft.agents.models.sight import Sight
from embodied_rft.agents.models.tiny_lm import TinyConfig
from embodied_rft.agents.models.tiny_vlm import TinyVLMConfig
from embodied_rft.agents.models.vlm import VLM, load_vlm
from embodied_rft.agents.parts.features import FrozenFeatures, standardized
from embodied_rft.data import CUT, MARK, PAST, Batch, Decisions, Field, Past, Ragged, Space, Tree, pick
from embodied_rft.device import drawn_on
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.encoder import cameras
from embodied_rft.networks.mlp import linear
from embodied_rft.networks.trainable import LoraOptions, Train, refuse_idle_beside
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import Policy, UnitValues, Values, require_rng
from embodied_rft.pools.protocol import flatten_space, is_text
from embodied_rft.pools.spaces import what_suits
from embodied_rft.pools.text_spaces import ChatText
from embodied_rft.registry import register
from embodied_rft.tokens.decoder import Decoder
from embodied_rft.tokens.log_probs import token_log_probs
from embodied_rft.tokens.micro_batches import plan_within
from embodied_rft.tokens.prefix_tree import Usage
from embodied_rft.turns.parsing import make_parser

OF_SIGHT = ("images", "freeze_vision", "cache_bytes")  # options of a model that sees


@dataclass(config=STRICT, kw_only=True)
class History:
    """What of a conversation is read."""

    turns: int | None = None  # the last k of those before; null: all
    first: bool = True  # the first turn is read, too, whatever `turns` says: it tells what the task is
    images: int | None = None  # pictures of the last k messages, the new one counted; null: all

    def __post_init__(self) -> None:
        if (self.turns or 0) < 0 or (self.images is not None and self.images < 1):
            raise UserError(f"history: turns of at least 0 and images of at least 1 are expected, given {self}")
        if self.turns is None and not self.first:
            raise UserError("history.first has no effect where all turns are read: give turns, too")


@dataclass(config=STRICT, kw_only=True)
class LanguageConfig:
    """Options of a `language` agent."""

    # folder or hub id; {"tiny": {...}} or {"tiny_vlm": {...}}: random weights, of one that reads or one that sees
    model: str | dict[Literal["tiny"], TinyConfig] | dict[Literal["tiny_vlm"], TinyVLMConfig]
    prompt: Literal["chat", "plain"] = "chat"  # as a user message through the chat template, or as it is
    system: str | None = None  # system message of "chat", where a prompt brings none of its own
    key: str | None = None  # observation key of the message; None: "prompt", or the only text there is
    images: tuple[str, ...] | None = None  # keys of the pictures before a message; null: all, of a model that sees
    history: History = field(default_factory=History)  # what of a conversation is read
    max_new_tokens: int = 64  # a reply that reaches it is cut, and marked so in the trace
    long_prompts: Literal["refuse", "skip"] = "refuse"  # those that leave no room for a reply: an error, or left out
    temperature: float = 1.0  # of sampling and of every log-probability
    top_k: int | None = None  # draw from the k likeliest tokens; null: all
    top_p: float | None = None  # draw from the likeliest tokens of this probability together; null: all
    marks: str | dict[str, Any] | None = None  # parser that says what of a reply is thought: "tags", {id: json, ...}
    stop: tuple[str, ...] = ()  # texts that end a reply; the text handed to the environment ends before them
    train: Train = "full"  # all weights, adapters, adapters and output layer, output layer, nothing
    freeze_vision: bool = False  # of train "full": keep the way from pixels to image features as it is
    lora: LoraOptions = field(default_factory=LoraOptions)
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights; log-probabilities are always computed in fp32
    gradient_checkpointing: bool = False  # compute a layer twice instead of keeping its activations
    token_chunk: int | None = None  # tokens whose logits exist at the same time; None: 64 MB of them
    share_prefix: bool = True  # compute the prompt of a group once
    cache_bytes: int = 2**28  # most memory for features of pictures, kept while the vision tower is frozen
    value_head: bool = False  # a value before every token on the same trunk, trained with the policy's loss

    def __post_init__(self) -> None:
        """Refuse what cannot work or has no effect."""
        refuse_idle_beside(self, "freeze_vision")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; expected > 0 (greedy=True takes the likeliest)")
        for name in ("max_new_tokens", "top_k", "token_chunk"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a probability in (0, 1]")
        if "" in self.stop:
            raise UserError(f"stop is {self.stop}; an empty text would end every reply: take it out")
        if self.system is not None and self.prompt != "chat":
            raise UserError('a system message has no effect with prompt "plain": use prompt "chat" or drop it')


@register("agent", "language")
class LanguagePolicy(Policy):
    """See docs/architecture.md for the methods.

    Trace: "reply" are token ids, "cut" says that the reply ran into `max_new_tokens`. A cut reply is a decision like
    any other: the environment judges what there is of it. Collecting counts it ("collect/cut_decisions"), policy
    gradients leave it out with `cut: drop`, and `overlong` makes it cost. With the option `marks`, "mark" says of every
    token whether it is thought (0) or a part of the answer (1), for objectives with `unit_weights`.
    """

    Config = LanguageConfig
    num_units = None
    reads_past = True
    trace_fields = {"reply": Field((), "int64", "ragged"), CUT: Field((), "bool")}  # noqa: RUF012
    spec: dict[str, Any]

    def __init__(
        self, config: LanguageConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        if not isinstance(action_space, gym.spaces.Text):
            raise UserError(
                f"action space {action_space}: this agent answers in text, a Text space is expected. "
                f"{what_suits(action_space)}"
            )
        self.config, self.leaves_out = config, config.long_prompts == "skip"
        self.image_keys = _pictures(config, observation_space)
        self.key = text_key(observation_space, config.key, also=self.image_keys)
        self.vlm: VLM | None = None
        if self.image_keys:
            self.vlm = load_vlm(
                _named(config.model), dtype=config.dtype, rng=rng, prompt=None, cache_bytes=config.cache_bytes
            )
            whole = self.vlm.layout.blocks == "prompt"  # read in both directions: never token by token
            self.lm = CausalLM(self.vlm.model, self.vlm.tokenizer, continues=not whole)
        else:
            refuse_idle(config, OF_SIGHT, "where the observation has no picture")
            if config.history.images is not None:
                raise UserError("history.images has no effect where the observation has no picture: leave it out")
            self.lm = load_model(config.model, dtype=config.dtype, rng=rng)  # type: ignore[arg-type]
            self.model = self.lm.model
        self.tokenizer = self.lm.tokenizer
        self._chats = chats = isinstance(flatten_space(observation_space)[self.key], ChatText)
        if chats and config.prompt != "chat":
            raise UserError(
                'prompts are lists of messages here: use prompt "chat", which writes them as the model does'
            )
        places = None if self.vlm is None else self.vlm.prompts.places
        end = self.lm.end_of(config.prompt)
        self.dialogue = Dialogue(
            self.tokenizer, config.prompt, end=end, system=config.system, chats=chats, places=places
        )
        self._frame = 0 if chats else len(self.dialogue.first("?"))  # tokens of a prompt of one character
        self.usage = Usage()  # of the decoder when it scores
        self.parser = None if config.marks is None else make_parser(config.marks)
        if self.parser is not None:
            self.trace_fields = {**self.trace_fields, MARK: Field((), "int8", "ragged")}
        if config.value_head:
            self.head = linear(self.lm.hidden_size, 1, gain=0.0, rng=rng)
        else:
            self.lacks = frozenset({Values, UnitValues})
        self.lora = config.lora
        self.select(config.train, lora=config.lora, rng=rng)
        if config.gradient_checkpointing:
            self.lm.checkpoint_layers()

    def select(self, train: Train, *, lora: LoraOptions, rng: torch.Generator) -> None:
        """Choose what is trained from now on (see `tuning.tune`); a value head learns beside all but "frozen"."""
        if self.vlm is not None:
            self.vlm.select(train, freeze_vision=self.config.freeze_vision and train == "full", lora=lora, rng=rng)
        self.lm.select(train, lora=lora, rng=rng, apart=self.vlm is not None)
        if self.config.value_head:
            self.head.requires_grad_(train != "frozen")

    # --- acting --------------------------------------------------------------------------------------------------

    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N replies to conversations that end with the messages `observation[key]`; each distinct one is read once."""
        from embodied_rft.tokens.generation import Sampling, generate

        c, (decoder, prompts) = self.config, self.conversations(observation)
        self._check_length(prompts.lengths, self.config.max_new_tokens)
        replies = generate(
            decoder,
            self.lm.head(c.temperature),
            prompts,
            sampling=Sampling(max_new_tokens=c.max_new_tokens, top_k=c.top_k, top_p=c.top_p, eos=self.lm.eos),
            rng=None if greedy else drawn_on(require_rng(rng), self.device),
            stop=self._stops if c.stop else None,
            allowed=self.lm.allowed,
        )
        text = [self.reply_text(ids) for ids in replies.ids]
        return Decisions(text, replies.log_prob, {"reply": replies.ids, CUT: replies.cut, **self._marks(replies.ids)})

    def reply_text(self, ids: np.ndarray) -> str:
        """What the environment gets: without special tokens, and only up to a stop text."""
        text = str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        for stop in self.config.stop:
            text = text.split(stop, 1)[0]
        return text

    def _marks(self, replies: Ragged) -> dict[str, Ragged]:
        """{"mark": of each token, 0 where it begins inside the thought that the parser finds, else 1}, if asked for.

        Form and end belong to the answer: a reply that says none has no thought to spare.
        """
        if self.parser is None:
            return {}
        marks = np.ones(len(replies.values), np.int8)
        for row, ids in enumerate(replies):
            parsed = self.parser.parse(self.reply_text(ids))
            if parsed.said is not None and (thought := parsed.thought) is not None:
                begins = functools.partial(self._begins, ids)  # never falls, so that few beginnings are decoded
                first, last = (bisect.bisect_left(range(len(ids)), place, key=begins) for place in thought)
                start = replies.offsets[row]
                marks[start + first : start + last] = 0
        return {MARK: Ragged(marks, replies.offsets)}

    def _begins(self, ids: np.ndarray, token: int) -> int:
        """At which character of a reply a token begins."""
        return len(str(self.tokenizer.decode(ids[:token].tolist(), skip_special_tokens=True)))

    def _stops(self, ids: list[int]) -> bool:
        """Whether the reply so far holds a stop text; a token has at least one byte, so its tail is enough."""
        longest = max(len(stop.encode()) for stop in self.config.stop)
        tail = str(self.tokenizer.decode(ids[-longest - 8 :], skip_special_tokens=True))
        return any(stop in tail for stop in self.config.stop)

    # --- scoring -------------------------------------------------------------------------------------------------

    def log_prob(self, observation: Tree, action: Sequence[str], trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every reply token, [B, U] each, zero behind the end of a reply.

        Scores the ids in the trace; only rows without them (somebody else's decisions) are tokenised, each text once.
        """
        hidden, replies = self._reply_states(observation, action, trace)
        targets = torch.from_numpy(replies.values).to(hidden.device)
        head = self.lm.head(self.config.temperature)
        flat = token_log_probs(hidden, targets, head, chunk=self.config.token_chunk)
        mask = torch.from_numpy(replies.pad()[1]).to(hidden.device)
        log_prob, entropy = (torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, f) for f in flat)
        return log_prob, entropy

    def _reply_states(self, observation: Tree, action: Sequence[str], trace: Tree) -> tuple[Tensor, Ragged]:
        """The states [sum of U, H] before every reply token, and the replies."""
        from embodied_rft.tokens.prefix import reply_states

        replies = self._replies(action, trace)
        decoder, prompts = self.conversations(observation)
        self.lm.check_ids(replies.values)
        return reply_states(decoder, prompts, replies, share=self.config.share_prefix, usage=self.usage), replies

    def micro_batches(self, batch: Batch, most: int) -> list[np.ndarray]:
        """The rows of micro-batches of at most `most` tokens each, padding included, siblings together."""
        prompts, replies = self.prompt_ids(batch.observation), self._replies(batch.action, batch.trace)
        return plan_within(prompts, replies, most=most, share=self.config.share_prefix, atoms=batch.atoms)

    def imitation_loss(
        self,
        observation: Tree,
        action: Sequence[str],
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: mean negative log-likelihood of the trace's reply; without a trace, of the text and an end token."""
        replies = self._replies(action, {} if trace is None else trace)
        log_prob, _ = self.log_prob(observation, action, {"reply": replies})
        return -log_prob.sum(1) / torch.from_numpy(replies.lengths).to(log_prob).clamp_min(1)

    def _replies(self, action: Sequence[str], trace: Tree) -> Ragged:
        """Ids of every row's reply: the trace's, or those of the text where a row has none.

        A reply is never empty, so an empty one is what a buffer keeps of a decision that came without a trace.
        """
        known: Ragged | None = trace.get("reply")
        if known is not None and known.lengths.all():
            return known
        said = texts(action)
        rows = [
            known.row(i) if known is not None and known.lengths[i] else self.dialogue.reply(said[i])
            for i in range(len(said))
        ]
        return Ragged.of(rows, dtype=np.int64)

    def retrace(self, observation: Tree, action: Sequence[str]) -> dict[str, Any]:
        """The trace of given replies: each text as token ids and an end token."""
        replies = Ragged.of([self.dialogue.reply(text) for text in texts(action)], dtype=np.int64)
        return {"reply": replies, CUT: np.zeros(len(replies), dtype=bool), **self._marks(replies)}

    # --- conversations -------------------------------------------------------------------------------------------

    def conversations(self, observation: Tree) -> tuple[Decoder, Ragged]:
        """What reads N conversations, and their ids up to where the next reply begins."""
        if self.key not in observation:
            raise UserError(f"the observation has no text {self.key!r}; it has {', '.join(sorted(observation))}")
        said = texts(observation[self.key])
        sight = None if self.vlm is None else Sight(self.vlm)
        shown = _Shown(self, observation, sight)
        past: Past | None = observation.get(PAST)
        before = None if past is None else _Shown(self, past.observation, sight)
        replies = None if past is None or not len(past.action) else self._replies(past.action, past.trace)
        history, rows = self.config.history, []
        for row in range(len(said)):
            turns = [] if past is None else past.index.row(row).tolist()
            seen = len(turns) if history.images is None else history.images - 1  # messages whose pictures are kept
            kept = (
                range(len(turns)) if history.turns is None else _window(len(turns), history.turns, first=history.first)
            )
            parts: list[np.ndarray] = []
            ended = True
            for number in kept:
                assert before is not None and replies is not None
                reply = replies.row(turns[number])
                parts += [
                    before.message(turns[number], first=not parts, ended=ended, seen=number >= len(turns) - seen),
                    reply,
                ]
                ended = bool(reply[-1] == self.dialogue.end)
            parts.append(shown.message(row, first=not parts, ended=ended, seen=True))
            rows.append(np.concatenate(parts))
            if not len(rows[-1]):
                raise UserError("an empty prompt, and a model without a begin token: there is nothing to continue")
        return sight or Decoder(self.lm.decoder), Ragged.of(rows, dtype=np.int64)

    def prompt_ids(self, observation: Tree) -> Ragged:
        """Ids of N conversations up to where the next reply begins."""
        return self.conversations(observation)[1]

    def unreadable(self, observation: Tree) -> dict[int, str]:
        """Rows whose prompt this policy cannot answer, and why: it leaves no room for a reply, or is no prompt."""
        found, limit, said = {}, self.lm.max_tokens, self.config.max_new_tokens
        plain = not self._chats and self.vlm is None
        for row, text in enumerate(texts(observation[self.key])):
            if text and plain and (limit is None or 2 * len(text.encode()) + self._frame + said <= limit):
                continue  # a token has at least a byte: it fits, and need not be tokenised to know it
            one = {key: pick(observation[key], np.array([row])) for key in (self.key, *self.image_keys)}
            try:
                self._check_length(self.prompt_ids(one).lengths, self.config.max_new_tokens)
            except ValueError as error:
                found[row] = str(error)
        return found

    def _check_length(self, prompt: np.ndarray, reply: np.ndarray | int) -> None:
        limit, total = self.lm.max_tokens, prompt + reply
        if limit is not None and total.max(initial=0) > limit:
            row = int(total.argmax())
            raise UserError(
                f"a prompt of {prompt[row]} tokens and {total[row] - prompt[row]} tokens for its reply exceed the "
                f"model's context of {limit} tokens: shorten the prompt, or lower history.turns or max_new_tokens"
            )

    # --- values and files ----------------------------------------------------------------------------------------

    def features(self, observation: Tree) -> Tensor:
        """What values are read from [B, H]: the state of the prompt's last token."""
        from embodied_rft.tokens.prefix import prompt_states

        return standardized(prompt_states(*self.conversations(observation)))

    def value(self, observation: Tree, trace: Tree) -> Tensor:
        """[B]: what reward to expect after each prompt, from the state of its last token."""
        return self.head(self.features(observation)).squeeze(-1)

    def unit_values(self, observation: Tree, action: Sequence[str], trace: Tree) -> Tensor:
        """[B, U]: the same before each token of the replies, 0 behind their ends; the first is that of the prompt."""
        states, replies = self._reply_states(observation, action, trace)
        mask = torch.from_numpy(replies.pad()[1]).to(states.device)
        flat = self.head(standardized(states)).squeeze(-1)
        return torch.zeros(mask.shape, device=states.device).masked_scatter(mask, flat)

    def make_encoder(self, *, rng: torch.Generator) -> FrozenFeatures:
        """What a value function reads: `features`, without gradient into this model."""
        return FrozenFeatures(self, self.lm.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return torch.device(self.lm.model.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (adapters merged into it), tokenizer and image processor: `model: folder` reads it."""
        (self.lm if self.vlm is None else self.vlm).save(Path(folder))


class _Shown:
    """Messages and pictures of some rows of an observation, as ids."""

    def __init__(self, policy: LanguagePolicy, observation: Tree, sight: Sight | None) -> None:
        self.dialogue, self.sight = policy.dialogue, sight
        self.said: Sequence[str] = observation.get(policy.key, ())
        self.pictures = [observation[key] for key in policy.image_keys if key in observation]
        if any(len(camera) != len(self.said) for camera in self.pictures):
            sizes = ", ".join(str(len(camera)) for camera in self.pictures)
            raise UserError(
                f"{len(self.said)} messages and {sizes} pictures were given: one of each kind a row is expected"
            )

    def message(self, row: int, *, first: bool, ended: bool, seen: bool) -> np.ndarray:
        """Ids of a message; its pictures are left out unless they are to be `seen`."""
        pictures = [one for camera in self.pictures for one in _row(camera, row)] if seen else []
        if first:
            ids = self.dialogue.first(self.said[row], len(pictures))
        else:
            ids = self.dialogue.following(self.said[row], len(pictures), ended=ended)
        if self.sight is None or not pictures:
            return ids
        assert self.dialogue.pictures is not None
        places = np.flatnonzero(ids == self.dialogue.pictures.id)
        parts = np.split(ids, np.repeat(places, 2) + np.tile([0, 1], len(places)))
        parts[1::2] = [self.sight.show(one) for one in pictures]
        return np.concatenate(parts)


def _row(camera: Any, row: int) -> Sequence[Any]:
    """The pictures of one row: of an array [B, H, W, 3], or of a list of lists."""
    return camera[row] if isinstance(camera, list) else camera[row][None]


def _window(count: int, turns: int, *, first: bool) -> list[int]:
    """Which of the turns before are read: the first, and the last k."""
    return sorted({*range(min(1, count) if first else 0), *range(max(0, count - turns), count)})


def _pictures(config: LanguageConfig, space: Space) -> list[str]:
    """Keys of the pictures that are read."""
    known = cameras(space)
    sees = isinstance(config.model, dict) and "tiny_vlm" in config.model
    for key in config.images or ():
        if key not in known:
            raise UserError(f"the observation has no image {key!r}; {nearest(key, known)}")
    keys = list(known) if config.images is None else list(config.images)
    if sees and not keys:
        raise UserError(
            'there is no image to see: a uint8 Box of shape [H, W, 3] is expected; model {"tiny": {...}} only reads'
        )
    if isinstance(config.model, dict) and not sees:
        if config.images:
            raise UserError('model {"tiny": {...}} sees no images: use {"tiny_vlm": {...}}, or leave images out')
        if config.key is None and keys:
            raise UserError(
                f"observation key {keys[0]!r} would not be read by a model that only reads texts: use model "
                '{"tiny_vlm": {...}}; or, if that is meant, name the text with the option key'
            )
        return []
    return keys


def _named(model: Any) -> Any:
    """As `load_vlm` takes it."""
    return {"tiny": model["tiny_vlm"]} if isinstance(model, dict) else model


def texts(column: Sequence[str]) -> list[str]:
    """A column of texts, which one text is not."""
    if isinstance(column, str):
        raise UserError(f"{column!r:.60} is one text; a list of texts, one for each row, is expected")
    return list(column)


def text_key(space: Space, key: str | None, *, also: Collection[str] = ()) -> str:
    """Which leaf of an observation space is the prompt: `key`, "prompt", or the only text.

    Without `key`, all of the observation must be read: the prompt, and the keys in `also`.

    Raises:
        ValueError: there is none, there are several to choose from, or something would be left out without a word.
    """
    leaves = flatten_space(space)
    texts = [name for name, leaf in leaves.items() if is_text(leaf)]
    if key is not None:
        if key not in texts:
            raise UserError(f"observation key {key!r} is no text; texts: {', '.join(texts) or '(none)'}")
        return key
    if "prompt" not in texts and len(texts) != 1:
        raise UserError(f"the observation has {len(texts)} texts ({', '.join(texts)}): choose one with the option key")
    chosen = "prompt" if "prompt" in texts else texts[0]
    unread = [name for name in leaves if name != chosen and name not in also]
    if unread:
        raise UserError(
            f"observation key {unread[0]!r} would not be read: this agent reads {', '.join([chosen, *also])}. If that "
            f"is meant, say so with the option key: {chosen}"
        )
    return chosen
