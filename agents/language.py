"""`language`: a causal language model that answers in text. One unit a token of its reply, the end token included.

Any Hugging Face decoder, by folder or hub id, or a tiny random one. What was sampled is what is trained: the trace
holds the token ids, and no text is ever tokenised again to score it. Boundary: text in, text out, log-probabilities of
stored ids; knows no reward and no objective. transformers is imported when a policy is made.
Legend: N prompts, B rows, U reply tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.models.causal_lm import CausalLM, load_model
from embodied_rft.agents.models.tiny_lm import TinyConfig
from embodied_rft.agents.parts.features import FrozenFeatures, standardized
from embodied_rft.data import CUT, Batch, Decisions, Field, Ragged, Space, Tree
from embodied_rft.device import drawn_on
from embodied_rft.names import UserError
from embodied_rft.networks.mlp import linear
from embodied_rft.networks.trainable import LoraOptions, Train, refuse_idle_beside
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, UnitValues, Values, require_rng
from embodied_rft.pools.protocol import flatten_space, is_text
from embodied_rft.pools.spaces import what_suits
from embodied_rft.pools.text_spaces import ChatText, read_chat, write_chat
from embodied_rft.registry import register
from embodied_rft.tokens.log_probs import token_log_probs
from embodied_rft.tokens.micro_batches import plan_within
from embodied_rft.tokens.prefix_tree import Usage


@dataclass(config=STRICT, kw_only=True)
class LanguageConfig:
    """Options of a `language` agent."""

    model: str | dict[str, TinyConfig]  # folder or hub id, or {"tiny": {...}} for random weights
    prompt: Literal["chat", "plain"] = "chat"  # as a user message through the chat template, or as it is
    system: str | None = None  # system message of "chat", where a prompt brings none of its own
    key: str | None = None  # observation key to read; None: "prompt", or the only text there is
    max_new_tokens: int = 64  # a reply that reaches it is cut, and marked so in the trace
    long_prompts: Literal["refuse", "skip"] = "refuse"  # those that leave no room for a reply: an error, or left out
    temperature: float = 1.0  # of sampling and of every log-probability
    top_k: int | None = None  # draw from the k likeliest tokens; null: all
    top_p: float | None = None  # draw from the likeliest tokens of this probability together; null: all
    stop: tuple[str, ...] = ()  # texts that end a reply; the text handed to the environment ends before them
    train: Train = "full"  # all weights, adapters, adapters and output layer, output layer, nothing
    lora: LoraOptions = field(default_factory=LoraOptions)
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights; log-probabilities are always computed in fp32
    gradient_checkpointing: bool = False  # compute a layer twice instead of keeping its activations
    token_chunk: int | None = None  # tokens whose logits exist at the same time; None: 64 MB of them
    share_prefix: bool = True  # compute the prompt of a group once
    value_head: bool = False  # a value before every token on the same trunk, trained with the policy's loss

    def __post_init__(self) -> None:
        """Refuse what cannot work or has no effect."""
        refuse_idle_beside(self)
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

    Trace: "prompt" and "reply" are token ids, "cut" says that the reply ran into `max_new_tokens`. A cut reply is a
    decision like any other: the environment judges what there is of it. Collecting counts it ("collect/cut_decisions"),
    policy gradients leave it out with `cut: drop`, and `overlong` makes it cost.
    """

    Config = LanguageConfig
    num_units = None
    trace_fields = {  # noqa: RUF012
        "prompt": Field((), "int64", "ragged"),
        "reply": Field((), "int64", "ragged"),
        CUT: Field((), "bool"),
    }
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
        self.key = text_key(observation_space, config.key)
        self.lm: CausalLM = load_model(config.model, dtype=config.dtype, rng=rng)
        self.model = self.lm.model
        self.tokenizer = self.lm.tokenizer
        self._chats = chats = isinstance(flatten_space(observation_space)[self.key], ChatText)
        if chats and config.prompt != "chat":
            raise UserError(
                'prompts are lists of messages here: use prompt "chat", which writes them as the model does'
            )
        self._encode = _make_encoder(self.tokenizer, config.prompt, config.system, chats=chats)
        self._end = self.lm.end_of(config.prompt)
        self._frame = 0 if chats else len(self._encode("?", True))  # tokens of a prompt of one character
        self.usage = Usage()  # of the decoder when it scores
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
        self.lm.select(train, lora=lora, rng=rng)
        if self.config.value_head:
            self.head.requires_grad_(train != "frozen")

    # --- acting --------------------------------------------------------------------------------------------------

    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N replies to the texts `observation[key]`; each distinct prompt is read once."""
        from embodied_rft.tokens.generation import Sampling, generate

        c, prompts = self.config, self.prompt_ids(observation)
        self._check_length(prompts.lengths, self.config.max_new_tokens)
        replies = generate(
            self.lm.decoder,
            self.lm.head(c.temperature),
            prompts,
            num_layers=self.lm.num_layers,
            sampling=Sampling(max_new_tokens=c.max_new_tokens, top_k=c.top_k, top_p=c.top_p, eos=self.lm.eos),
            rng=None if greedy else drawn_on(require_rng(rng), self.device),
            stop=self._stops if c.stop else None,
            allowed=self.lm.allowed,
        )
        text = [self.reply_text(ids) for ids in replies.ids]
        return Decisions(text, replies.log_prob, {"prompt": prompts, "reply": replies.ids, CUT: replies.cut})

    def reply_text(self, ids: np.ndarray) -> str:
        """What the environment gets: without special tokens, and only up to a stop text."""
        text = str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        for stop in self.config.stop:
            text = text.split(stop, 1)[0]
        return text

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

        trace = self._complete(observation, action, trace)
        prompts, replies = trace["prompt"], trace["reply"]
        self.lm.check_ids(prompts.values, replies.values)
        share, layers = self.config.share_prefix, self.lm.num_layers
        return reply_states(
            self.lm.decoder, prompts, replies, num_layers=layers, share=share, usage=self.usage
        ), replies

    def micro_batches(self, batch: Batch, most: int) -> list[np.ndarray]:
        """The rows of micro-batches of at most `most` tokens each, padding included, siblings together."""
        trace, share = self._complete(batch.observation, batch.action, batch.trace), self.config.share_prefix
        return plan_within(trace["prompt"], trace["reply"], most=most, share=share, atoms=batch.atoms)

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
        trace = self._complete(observation, action, {} if trace is None else trace)
        log_prob, _ = self.log_prob(observation, action, trace)
        return -log_prob.sum(1) / torch.from_numpy(trace["reply"].lengths).to(log_prob).clamp_min(1)

    def _complete(self, observation: Tree, action: Sequence[str], trace: Tree) -> Tree:
        """Prompt and reply ids of every row: the trace's, or those of the texts where a row has none.

        A prompt is never empty, so an empty one is what a buffer keeps of a decision that came without a trace.
        """
        if "reply" not in trace:
            return self.retrace(observation, action)
        unknown = np.flatnonzero(trace["prompt"].lengths == 0)
        if not len(unknown):
            return trace
        shown, said = texts(observation[self.key]), texts(action)
        written = self.retrace({self.key: [shown[row] for row in unknown]}, [said[row] for row in unknown])
        number = {row: place for place, row in enumerate(unknown.tolist())}
        return {
            name: Ragged.of(
                [written[name].row(number[row]) if row in number else ids for row, ids in enumerate(trace[name])],
                dtype=np.int64,
            )
            for name in ("prompt", "reply")
        }

    def retrace(self, observation: Tree, action: Sequence[str]) -> dict[str, Any]:
        """The trace of given replies: each text as token ids and an end token."""
        action = texts(action)
        count = len(action)
        prompts = self.prompt_ids({self.key: texts(observation[self.key])[:count]})  # a trajectory has one more
        replies = Ragged.of([np.append(self._encode(text, False), self._end) for text in action], dtype=np.int64)
        self._check_length(prompts.lengths, replies.lengths)
        return {"prompt": prompts, "reply": replies, CUT: np.zeros(count, dtype=bool)}

    def prompt_ids(self, observation: Tree) -> Ragged:
        """Token ids of N prompts."""
        if self.key not in observation:
            raise UserError(f"the observation has no text {self.key!r}; it has {', '.join(sorted(observation))}")
        return Ragged.of([self._encode(text, True) for text in texts(observation[self.key])], dtype=np.int64)

    def unreadable(self, observation: Tree) -> dict[int, str]:
        """Rows whose prompt this policy cannot answer, and why: it leaves no room for a reply, or is no prompt."""
        found, limit, said = {}, self.lm.max_tokens, self.config.max_new_tokens
        for row, text in enumerate(texts(observation[self.key])):
            if text and not self._chats and (limit is None or 2 * len(text.encode()) + self._frame + said <= limit):
                continue  # a token has at least a byte: it fits, and need not be tokenised to know it
            try:
                self._check_length(np.array([len(self._encode(text, True))]), self.config.max_new_tokens)
            except ValueError as error:
                found[row] = str(error)
        return found

    def _check_length(self, prompt: np.ndarray, reply: np.ndarray | int) -> None:
        limit, total = self.lm.max_tokens, prompt + reply
        if limit is not None and total.max(initial=0) > limit:
            row = int(total.argmax())
            raise UserError(
                f"a prompt of {prompt[row]} tokens and {total[row] - prompt[row]} tokens for its reply exceed the "
                f"model's context of {limit} tokens: shorten the prompt or lower max_new_tokens"
            )

    # --- values and files ----------------------------------------------------------------------------------------

    def features(self, observation: Tree) -> Tensor:
        """What values are read from [B, H]: the state of the prompt's last token."""
        from embodied_rft.tokens.prefix import prompt_states

        return standardized(prompt_states(self.lm.decoder, self.prompt_ids(observation)))

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
        return next(self.model.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (adapters merged into it) and tokenizer: `model: folder` and Hugging Face read it."""
        self.lm.save(Path(folder))


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


def _make_encoder(tokenizer: Any, prompt: str, system: str | None, *, chats: bool) -> Callable[[str, bool], np.ndarray]:
    """encode(text, is_prompt) -> ids; remembers what it has seen, so a text is tokenised once.

    `chats`: prompts are lists of messages, as `text_spaces.write_chat` writes them; a system message of theirs goes
    before the option `system`.
    """
    if prompt == "chat" and not tokenizer.chat_template:
        raise UserError('the tokenizer has no chat template: use prompt "plain", or a checkpoint that has one')

    @functools.lru_cache(maxsize=65_536)
    def encode(text: str, is_prompt: bool) -> np.ndarray:
        if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
            raise UserError(f"{text!r:.60} is no text: a str of valid Unicode is expected")
        if is_prompt and prompt == "chat":
            messages = read_chat(text) if chats else [{"role": "user", "content": text}]
            if system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            try:
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates are programs, and some refuse a system message
                raise UserError(
                    f"the tokenizer's chat template refuses {', '.join(m['role'] for m in messages)} messages "
                    f'({error}): {"drop the option system, or " if system else ""}use prompt "plain"'
                ) from error
        ids: Sequence[int] = tokenizer(text, add_special_tokens=is_prompt and prompt == "plain")["input_ids"]
        if is_prompt and prompt == "plain":  # begins as the tokenizer begins a text, but does not end
            ids = (
                ids[:-1]
                if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
                else ids
            )
            ids = ids or [i for i in (tokenizer.bos_token_id,) if i is not None]
        if is_prompt and not ids:
            raise UserError("an empty prompt was given to a model without a begin token: there is nothing to continue")
        array = np.asarray(ids, dtype=np.int64)
        array.flags.writeable = False
        return array

    if prompt == "chat":  # a template that refuses is refused now
        encode(write_chat([{"role": "user", "content": "?"}]) if chats else "?", True)
    return encode
