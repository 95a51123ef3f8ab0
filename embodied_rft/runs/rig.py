"""What a policy stands on: its environments, the columns it needs, the one buffer; all follow when the policy changes.

Pools and schema are derived from the policy as it is now. Another policy, or environments with other options, get pools
of their own, and the experience so far is carried over as far as they can read it. Knows neither stages nor learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from embodied_rft import distributed
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.hindsight import Goals
from embodied_rft.buffer.memory import announce
from embodied_rft.data import Field, Trajectory, is_picture
from embodied_rft.experience.collect import action_field
from embodied_rft.experience.recut import chunk_trajectories
from embodied_rft.learning.agent import Agent, Spaces
from embodied_rft.policy import Policy, Refuses, Retraces, able
from embodied_rft.pools.chunks import Chunk
from embodied_rft.pools.described import Described, Description, describe_pool
from embodied_rft.pools.making import make_single
from embodied_rft.pools.pool import VectorPool, num_envs_for, open_pool
from embodied_rft.pools.protocol import Pool, Purpose
from embodied_rft.pools.states import unreadable
from embodied_rft.runs.log import Logger
from embodied_rft.runs.recipe import Recipe


class Rig:
    """Pools, schema and buffer for `agent`, which whoever builds on this sets first.

    Args:
        recipe: of the run.
        logger: of the run.
        described: the environments are not made; this is what they show and take (see `spaces`).
    """

    agent: Agent

    def __init__(self, recipe: Recipe, logger: Logger, described: Sequence[Description | None] = ()) -> None:
        self.recipe, self.logger = recipe, logger
        self.env = recipe.env  # as it is now: a stage may change its options
        self.spaces: list[Description | None] = []  # of the first environments, and of each that came in their place
        self._described, self._replaced = described, 0
        self._pools: dict[str, Pool] = {}  # of single steps, as the environment offers them
        self._fitted: dict[str, Pool] = {}  # as the current policy acts: in steps, in chunks, or along a plan
        self._buffer: Buffer | None = None
        self._goals: Goals | None = None
        self.left_out = 0  # initial states that the policy cannot read

    # --- environments --------------------------------------------------------------------------------------------

    def step_pool(self, purpose: Purpose) -> Pool:
        """The environments for "training" or "evaluation", one decision a step; made once."""
        if purpose not in self._pools:
            self._pools[purpose] = pool = self._make_pool(purpose)
            self.spaces[self._replaced :] = [describe_pool(pool)]
        return self._pools[purpose]

    def _make_pool(self, purpose: Purpose) -> Pool:
        known = self._described[self._replaced] if self._replaced < len(self._described) else None
        if known is not None:
            return VectorPool(Described(known))
        num_envs = num_envs_for(self.env, purpose)
        if purpose == "training":
            num_envs = distributed.share(num_envs, "env.num_envs")
        return open_pool(self.env, purpose=purpose, num_envs=num_envs)

    def pool(self, purpose: Purpose) -> Pool:
        """The environments as the current policy acts in them."""
        if purpose not in self._fitted:
            self._fitted[purpose] = self.agent.policy.fit_pool(self.step_pool(purpose))
        return self._fitted[purpose]

    def leave_out_unreadable(self) -> None:
        """Initial states that the policy cannot read are refused now, or left out, and counted, if it says so."""
        policy = self.agent.policy
        if (reader := able(policy, Refuses)) is None:
            return
        names = unreadable(self.step_pool("training"), reader.unreadable, leave_out=policy.leaves_out)
        if names:
            self.close_pools()
            exclude = [*self.env.options.get("exclude", ()), *names]
            self.env = replace(self.env, options={**self.env.options, "exclude": exclude})
            self.left_out += len(names)

    # --- experience ----------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> Buffer:
        """The one buffer; announced and made when a stage first needs it."""
        if self._buffer is None:
            schema, capacity = self.schema(), self.recipe.buffer.capacity
            self.logger.message(announce(schema, capacity))
            self._buffer = Buffer(schema, capacity, past=self.agent.policy.reads_past)
            self._buffer.goals = self.goals
        return self._buffer

    @property
    def goals(self) -> Goals:
        """How the environments, as they are now, pay for goals."""
        if self._goals is None:
            env = self.env
            self._goals = Goals(lambda: make_single(env.id, options=env.options, wrappers=env.wrappers))
        return self._goals

    def schema(self) -> Schema:
        """The columns that this environment and this policy need."""
        pool, policy = self.pool("training"), self.agent.policy
        shown = {key: _by_content(field) if policy.reads_past else field for key, field in pool.fields.items()}
        return Schema(
            observation=shown,
            action=action_field(pool.action_space),
            trace=dict(policy.trace_fields),
            units=policy.num_units,
            rewards=("env", *["success"] * self.recipe.buffer.success, *self.recipe.buffer.streams),
        )

    def replace_policy(self, policy: Policy) -> None:
        """Another policy on the same experience: rows are carried over, their traces recomputed for the new policy.

        Single steps become chunks for a policy that takes chunks, and keys that are no longer observed are left out.
        What the new policy cannot read (chunks as single steps, keys that nobody recorded) is dropped.
        """
        old_schema, was_single = self.schema(), self.agent.policy.chunk.horizon == 1
        self.agent.policy = policy
        self._fitted.clear()
        schema = self._new_schema()
        if self._buffer is None or schema == old_schema:
            return
        old, self._buffer = self._buffer, None
        recorded = all(old_schema.observation.get(key) == field for key, field in schema.observation.items())
        if not recorded or (not was_single and schema.action != old_schema.action):
            self.logger.message("decisions are different now: the experience so far is dropped")
            return
        for name in [name for name in old.rewards if name not in schema.rewards]:
            self.buffer.label(name, np.zeros(0, np.int64), np.zeros(0))  # what was labelled comes along
        keys, cut = schema.observation.keys(), policy.chunk if was_single else Chunk()
        for each in old.trajectories():
            log_prob = each.log_prob if schema.units == old_schema.units else None  # else unknown now
            each = replace(each, observation={k: each.observation[k] for k in keys}, log_prob=log_prob)
            self.add_trajectories([each], chunk=cut)
        if old.num_pinned:
            self.buffer.pin()

    def replace_env(self, options: dict[str, Any]) -> None:
        """The environments from here on have these options, too; experience that lacks what they show is dropped."""
        old_schema = self.schema()
        self.close_pools()
        self._replaced += 1
        self.env, self._goals = replace(self.env, options={**self.env.options, **options}), None
        if self._new_schema() != old_schema and self._buffer is not None:
            self._buffer = None
            self.logger.message("observations are different now: the experience so far is dropped")
        if self._buffer is not None:
            self._buffer.goals = self.goals

    def _new_schema(self) -> Schema:
        """The columns, after telling the agent that environments or policy are others now."""
        self.leave_out_unreadable()
        pool = self.pool("training")
        self.agent.spaces = Spaces(pool.observation_space, pool.action_space)
        return self.schema()

    def add_trajectories(self, trajectories: Iterable[Trajectory], *, chunk: Chunk) -> None:
        """Whole episodes into the buffer, as the current policy's decisions.

        Args:
            trajectories: of decisions, or of single steps.
            chunk: what single steps are to be cut into; `Chunk()`: trajectories stay as they are.
        """
        retrace = able(self.agent.policy, Retraces)
        for one in trajectories:
            for each in [one] if chunk.horizon == 1 else chunk_trajectories([one], **vars(chunk)):
                self.buffer.add_trajectory(each, retrace=None if retrace is None else retrace.retrace)

    def buffer_state(self) -> dict[str, Any] | None:
        """Of the buffer; None before a stage needs one."""
        return None if self._buffer is None else self._buffer.state_dict()

    def close_pools(self) -> None:
        """Give back the environments."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._fitted.clear()


def _by_content(field: Field) -> Field:
    """The column of pictures that are kept once each: turns and siblings of an episode show the same ones."""
    return Field((), "uint8", "images") if is_picture(field.shape, field.dtype) else field
