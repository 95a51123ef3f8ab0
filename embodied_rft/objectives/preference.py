"""`dpo` and its kin: learn from which of two things was better, the pairs drawn from the same buffer as everything.

A thing is a piece of an episode: the whole of it (a reply, a dialogue) or a segment of so many decisions. `PairPlan`
finds pairs and keeps their decisions together in a `PairBatch`; the loss sees the margin between the two scores.
Whoever has labelled pairs stores both sides as episodes of one group, with rewards 1 and 0.
Legend: B decisions, P pairs, U units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Drawn
from embodied_rft.data import Batch
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective, fit_normalizers
from embodied_rft.names import UserError
from embodied_rft.objectives.common import preset, score_in_chunks, segment_returns
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy
from embodied_rft.registry import register

# --- reading ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class PairBatch(Batch):
    """The decisions of P pairs, pair after pair, which `together` keeps whole: the better piece, then the other.

    `columns` has "pair" [B] (numbers that never fall), "chosen" [B] bool and "place" [B], the decision's place in its
    piece, from 0.
    """

    num_pairs: int = 0  # of the whole batch; kept by split()


@dataclass(config=STRICT, kw_only=True)
class PairPlan(Drawn):
    """Batches of `batch_size` pairs; each update draws its own."""

    batch_size: int = 64  # pairs
    within: Literal["group", "seed", "all"] = "group"  # what the two of a pair share
    pairing: Literal["random", "extremes"] = "random"  # any two that differ, or the best and the worst
    segment: int | None = None  # decisions of a piece; None: whole episodes
    min_gap: float = 0.0  # returns that differ by no more are a draw

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """Batches without end; none if all that can be compared is equally good: then there is nothing to learn.

        Raises:
            ValueError: no two pieces can be compared.
        """
        pieces, score, kind = self._pieces(buffer)
        best, worst = self._extremes(score, kind)
        while len(best):
            if self.pairing == "extremes":
                drawn = rng.integers(len(best), size=self.batch_size)
                chosen, rejected = best[drawn], worst[drawn]
            else:
                chosen, rejected = self._draw(rng, score, kind, kind[best])
            yield pair_batch(buffer, [pieces[i] for i in chosen], [pieces[i] for i in rejected])

    def _pieces(self, buffer: Buffer) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(rows of each piece, return of each, what it may be compared within: equal numbers)."""
        pieces = buffer.segments(buffer.rows())
        if (length := self.segment) is not None:
            pieces = [p[i : i + length] for p in pieces for i in range(0, len(p) - length + 1, length)]
        if not pieces:
            raise UserError("the buffer holds no episode (of the segment's length) to compare: collect or load some")
        score = segment_returns(buffer, pieces, reward_weights=self.reward_weights)
        book = buffer.columns(np.array([p[0] for p in pieces]))
        kind = np.zeros(len(pieces), np.int64) if self.within == "all" else book[self.within]
        return pieces, score, np.where(kind < 0, -1 - np.arange(len(pieces)), kind)  # -1: of no group, alone

    def _extremes(self, score: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best and the worst piece of each kind in which they differ."""
        order = np.lexsort((score, kind))
        last = np.flatnonzero(np.append(np.diff(kind[order]) != 0, True))
        first = np.append(0, last[:-1] + 1)
        worst, best = order[first], order[last]
        if len(last) == len(order):
            raise UserError(
                f"there is no pair: each of {len(order)} pieces is alone in its {self.within}. Collect with a "
                "group_size of at least 2, or compare within seed or all."
            )
        differ = score[best] - score[worst] > self.min_gap
        return best[differ], worst[differ]

    def _draw(
        self, rng: np.random.Generator, score: np.ndarray, kind: np.ndarray, mixed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(chosen [P], rejected [P]): two of a kind that differ, uniformly over ordered pairs of a random first."""
        pool = np.flatnonzero(np.isin(kind, mixed))
        pool = pool[np.argsort(kind[pool], kind="stable")]
        start, stop = (np.searchsorted(kind[pool], kind[pool], side=side) for side in ("left", "right"))
        chosen, rejected = np.zeros(0, np.int64), np.zeros(0, np.int64)
        while len(chosen) < self.batch_size:
            one = rng.integers(len(pool), size=2 * self.batch_size)
            other = pool[rng.integers(start[one], stop[one])]
            one = pool[one]
            differ = np.abs(score[one] - score[other]) > self.min_gap
            one, other = one[differ], other[differ]
            better = score[one] > score[other]
            chosen = np.append(chosen, np.where(better, one, other))
            rejected = np.append(rejected, np.where(better, other, one))
        return chosen[: self.batch_size], rejected[: self.batch_size]


def pair_batch(buffer: Buffer, chosen: list[np.ndarray], rejected: list[np.ndarray]) -> PairBatch:
    """The batch of P pairs; each piece is the rows of its decisions."""
    sides = [side for pair in zip(chosen, rejected, strict=True) for side in pair]
    lengths = np.array([len(side) for side in sides])
    batch = buffer.batch(np.concatenate(sides), next_observation=False)
    batch.together = "pair"
    number = np.repeat(np.arange(len(sides)), lengths)
    batch.columns |= {
        "pair": number // 2,
        "chosen": number % 2 == 0,
        "place": np.arange(len(number)) - np.repeat(np.cumsum(lengths) - lengths, lengths),
    }
    return PairBatch(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}, num_pairs=len(chosen))


# --- learning --------------------------------------------------------------------------------------------------------


@dataclass(config=STRICT, kw_only=True)
class DPOConfig(PairPlan):
    """Options of `dpo` and its kin: which pairs, and these."""

    loss: losses.Preference = "sigmoid"  # of the margin: DPO's, IPO's ("squared") or SLiC's ("hinge")
    beta: float = 0.1  # strength of the pull to the reference, or scale of the log-probabilities without one
    reference: Literal["start", "none"] = "start"  # the policy when the stage starts
    smoothing: float = 0.0  # how often labels are wrong (conservative DPO)
    per_unit: bool = False  # means over the units of a piece in place of sums, so that length has no say
    margin: float = 0.0  # what the better score must lead by, after beta
    gamma: float = 1.0  # weight of a decision's score, to the power of its place in the piece
    rejected_weight: float = 1.0  # of the worse piece's score (CPL's bias, below 1)
    chosen_weight: float = 0.0  # of the better piece's own negative log-likelihood, beside the preference

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 0.5 or (self.smoothing and self.loss != "sigmoid"):
            raise UserError(f'smoothing {self.smoothing}: expected in [0, 0.5), and only with loss "sigmoid"')
        if self.beta <= 0:
            raise UserError(f"beta {self.beta}: a positive number is expected")


@register("objective", "dpo")
class DPO(Objective):
    """Direct preference optimisation (Rafailov et al. 2023): the margin of log-ratios to a reference."""

    Config: type = DPOConfig

    config: DPOConfig

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        self.losses: Losses = {"policy": self.policy_loss}
        self.reading: PairPlan = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """The reference."""
        if self.config.reference == "start":
            agent.ensure_copy("reference")

    def score(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability of each decision [B], the sum over its units, and how many these are [B]."""
        log_prob, _ = policy.log_prob(batch.observation, batch.action, batch.trace)
        # Of pairs that somebody else wrote, no log-probability was stored: what is behind a reply's end is 0.
        mask = batch.mask if batch.mask.shape == log_prob.shape else log_prob.detach() != 0
        return torch.where(mask, log_prob, 0.0).sum(1), mask.sum(1)

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean preference loss over pairs."""
        assert isinstance(batch, PairBatch)
        c, columns = self.config, batch.columns
        own, units = self.score(agent.policy, batch)
        score = own - self._reference(agent, batch) if c.reference == "start" else own
        number = torch.from_numpy(columns["pair"] - columns["pair"][0]).to(score.device)
        if c.per_unit:  # the length of a piece is that of all its decisions
            piece = 2 * number + torch.from_numpy(columns["chosen"]).to(number)
            length = torch.zeros(int(piece.max()) + 1, device=score.device).index_add(0, piece, units.to(score))[piece]
            own, score = own / length.clamp_min(1), score / length.clamp_min(1)
        sign = np.where(columns["chosen"], 1.0, -c.rejected_weight) * c.gamma ** columns["place"]
        margin = torch.zeros(int(number[-1]) + 1, device=score.device)
        margin = margin.index_add(0, number, score * torch.from_numpy(sign).to(score)) - c.margin / c.beta
        each = losses.preference(margin, kind=c.loss, beta=c.beta, smoothing=c.smoothing)
        loss = each.sum() / batch.num_pairs
        if c.chosen_weight:
            loss = loss - c.chosen_weight * own[torch.from_numpy(columns["chosen"])].sum() / batch.num_pairs
        metrics = {"policy/loss": loss.detach(), "preference/accuracy": (margin.detach() > 0).float().mean()}
        return loss, metrics | {"preference/margin": margin.detach().mean()}

    def _reference(self, agent: Agent, batch: Batch) -> Tensor:
        """[B], as noted; computed for experience that came after `annotate`."""
        noted = batch.notes.get("reference_score")
        if noted is not None and not bool(noted.isnan().any()):
            return noted
        with torch.no_grad():
            return self.score(agent.part("reference", Policy), batch)[0]

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Write "reference_score", one number a decision."""
        fit_normalizers(agent, buffer, rows)
        if self.config.reference == "start" and len(rows):
            batch = buffer.batch(rows, next_observation=False)
            reference = agent.part("reference", Policy)
            score = score_in_chunks(lambda b: self.score(reference, b)[0], batch, agent.device)
            buffer.annotate("reference_score", rows, score.numpy())
        return {}


@preset("ipo", loss="squared")
class IPO(DPO):
    """Identity preference optimisation (Azar et al. 2023): the margin is drawn to 1 / (2 beta), not to infinity."""


@preset("simpo", reference="none", per_unit=True, beta=2.0, margin=1.0)
class SimPO(DPO):
    """Simple preference optimisation (Meng et al. 2024, eq. 6): mean log-probabilities, a margin, no reference."""


@preset("slic", reference="none", loss="hinge", beta=1.0, chosen_weight=0.1)
class SLiC(DPO):
    """Sequence likelihood calibration (Zhao et al. 2023, eq. 3): a hinge on log-probabilities, and stay likely."""


@preset("cpl", within="all", segment=16, reference="none", rejected_weight=0.5)
class CPL(DPO):
    """Contrastive preference learning (Hejna et al. 2023, eq. 5 and 8): segments and their log-probabilities.

    The paper's labels say which segment has less regret; here the larger sum of rewards is preferred, since
    a buffer knows no optimal advantage. Both agree where rewards are the optimal advantage up to a constant; where they
    do not (a reward that comes late), label segments elsewhere and store a reward stream for `reward_weights`.
    """
