"""What turns token ids into hidden states: a Hugging Face decoder without its output layer.

Everything in this room computes through it. A subclass may know ids that are no tokens, such as places of a picture,
and positions that are not counted one by one. Boundary: ids in, states out; knows no text.
Legend: M rows, C tokens of each, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft.data import Ragged

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Decoder:
    """A decoder in evaluation mode, or in training mode without noise.

    Args:
        module: a Hugging Face model without its output layer.
    """

    first_position = 0  # of the first token of a text
    counts = True  # positions are 0, 1, 2, ...
    looks_ahead = False  # a prompt is no plain left-to-right text: only whole prompts are shared

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def device(self) -> torch.device:
        """Where its weights live."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.module.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """How many layers keep keys and values."""
        return int(self.module.config.num_hidden_layers)

    @property
    def takes_any_mask(self) -> bool:
        """Whether its attention may be given masks of bool [rows, 1, tokens, past + tokens]."""
        config = self.module.config
        limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        plain = {*(getattr(config, "layer_types", None) or ())} <= {"full_attention"} and not any(limits)
        return plain and config._attn_implementation == "sdpa"

    def places(self, rows: Ragged, side: Literal["left", "right"] = "right") -> tuple[np.ndarray, np.ndarray]:
        """Positions of tokens from the first of each row on, [..., M, C] as they are padded, and of whole rows [M].

        Padding may have any number.
        """
        lengths = rows.lengths
        width = int(lengths.max(initial=0))
        relative = np.broadcast_to(np.arange(width), (len(rows), width))
        return (relative + (lengths - width)[:, None] if side == "left" else relative), lengths

    def __call__(
        self, ids: Tensor, *, cache: Cache | None = None, mask: Tensor | None = None, position: Tensor | None
    ) -> Tensor:
        """[M, C, H]: the last hidden states.

        Args:
            ids: [M, C].
            cache: keys and values that come before, and where new ones go.
            mask: [M, past + C] bool, False at padding, or [M, 1, C, past + C]; None: nothing is padded on the left.
            position: [M, C] (or more, see `places`) of the tokens in their text, negative at padding; None: 0, 1, ...
        """
        if position is not None:
            position = position.clamp_min(0)
        # use_cache only asks for a cache when none is given, and checkpointing of layers refuses it.
        given = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": False}
        states: Tensor = self.module(**self.inputs(ids), **given).last_hidden_state
        return states

    def inputs(self, ids: Tensor) -> dict[str, object]:
        """What the module is given for these ids."""
        return {"input_ids": ids}


def at(start: Tensor, relative: np.ndarray) -> Tensor:
    """Positions [..., M, C] of tokens that are `relative` [..., M, C] to where their rows start [M]."""
    return start[:, None] + torch.from_numpy(np.array(relative)).to(start.device)
