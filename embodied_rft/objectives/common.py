"""What several objectives share: the type of a loss table, statistics of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rft.agent import Agent
from embodied_rft.data import Batch

LossFunction = Callable[[Agent, Batch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
Losses = dict[str, LossFunction]


def fit_normalizers(agent: Agent, buffer: Any, rows: np.ndarray, *, limit: int = 20_000) -> None:
    """Give standardising encoders the statistics of at most `limit` rows, spread evenly; once."""
    waiting = agent.normalizers()
    if waiting and len(rows):
        spread = rows[:: max(1, len(rows) // limit)][:limit]
        observation = buffer.batch(spread, next_observation=False).observation
        for encoder in waiting:
            encoder.fit({key: value.to(agent.device) for key, value in observation.items()})
