"""A run opened to be used: `load_policy` for one's own loop, the session behind `erft eval` and `erft play`.

Only reads, so it may be done while the run is being trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied_rft.data import Space
from embodied_rft.device import seeded
from embodied_rft.learning.agent import Agent
from embodied_rft.names import UserError
from embodied_rft.pools.answers import leaves_of
from embodied_rft.pools.chunks import BASE_ACTION
from embodied_rft.runs import inputs, resume
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import LogConfig
from embodied_rft.runs.recipe import recipe_of
from embodied_rft.runs.resume import Which, read_state
from embodied_rft.runs.session import Session
from embodied_rft.runs.trust import say
from embodied_rft.runs.yaml_tree import read_yaml


@contextmanager
def opened(
    folder: str | Path,
    which: Which = "newest",
    *,
    device: str = "auto",
    trust: bool = False,
    environments: bool = True,
) -> Iterator[Session]:
    """A session with the policy of a run, and an empty folder of its own that is removed at the end.

    Its training pool holds one environment; without `environments` it only has their spaces, as far as the checkpoint
    tells them, so that nothing of them needs to be installed. Where the run was trained does not matter for `device`.
    Code that the run brings along is only run with `trust` (docs/security.md).
    """
    run = RunFolder(Path(folder).absolute())
    state = read_state(run, which)
    described = () if environments or None in state.get("spaces", [None]) else state["spaces"]
    recipe = recipe_of(state["recipe"], run.path, trust=trust, environments=not described)
    say(read_yaml(state["recipe"]), run.path, environments=not described)
    for path, digest in recipe.inputs.items():
        if Path(path).exists() and inputs.hash_of(Path(path)) != digest:
            raise UserError(f"{path} is not what it was when the run in {run} read it")
    env = replace(recipe.env, num_envs=1, num_workers=None, evaluation_envs=None)
    silent = LogConfig(console=False, csv=False)
    with tempfile.TemporaryDirectory(prefix="erft-") as scratch:
        changed = replace(recipe, env=env, logging=silent, device=device)
        session = Session(changed, RunFolder(scratch), quiet=True, text=state["recipe"], described=described)
        try:
            resume.load_weights(session, state)
            averaged = (state["learner"] or {}).get("averaged")
            if averaged is not None:  # who only looks sees what evaluations see
                session.agent.policy.load_state_dict(averaged)
            session.env = replace(recipe.env, options=session.env.options)
            yield session
        finally:
            session.close()


# --- in one's own loop ---------------------------------------------------------------------------------------------


def load_policy(
    folder: str | Path, *, checkpoint: Which = "newest", device: str = "auto", trust: bool = False
) -> TrainedPolicy:
    """The trained policy of a run folder, for one's own loop; the environment is not made.

        policy = load_policy("runs/demo")
        action = policy(observation)

    Args:
        folder: of the run, finished or not.
        checkpoint: "newest", or "best" on the learning curve.
        device: "auto", "cpu", "cuda" or "cuda:1".
        trust: code that the run brings along may run: plug-ins in its folder, classes, pickles.

    Raises:
        ValueError: no run or no such checkpoint in the folder, or code that is not trusted.
    """
    with opened(folder, checkpoint, device=device, trust=trust, environments=False) as session:
        pool = session.step_pool("training")
        return TrainedPolicy(session.agent, pool.observation_space, pool.action_space, seed=session.recipe.seed)


class TrainedPolicy:
    """A policy that is called with observations as its environment gives them, of one environment or of N at once.

    Policies that plan chunks keep the rest of their plan between calls: call `reset` when an episode begins.

    Args:
        agent: who acts.
        observation_space: of a single environment.
        action_space: of a single environment, of one step.
        seed: of what is drawn.
    """

    def __init__(self, agent: Agent, observation_space: Space, action_space: Space, *, seed: int = 0) -> None:
        self.agent, self.policy = agent, (policy := agent.policy)
        self.observation_space, self.action_space = observation_space, action_space
        weights = next(iter(policy.parameters()), None)
        self.rng = seeded(seed, "cpu" if weights is None else weights.device)
        self.reset()

    def reset(self) -> None:
        """An episode begins: what was planned before is forgotten."""
        self._plan: list[np.ndarray] = []  # actions still to come, each [N, A]
        self._base: list[np.ndarray] = []  # the same of a frozen base that plans

    @torch.no_grad()
    def __call__(self, observation: Any, *, greedy: bool = True) -> Any:
        """The action to take now.

        Args:
            observation: of `observation_space`, or N of them along a first dimension of every part.
            greedy: whether to take the likeliest action, else one is drawn.

        Returns:
            An action of `action_space`; N of them along a first dimension if there are N observations.
        """
        tree, single = self._batch(observation)
        chunk, planner = self.policy.chunk, self.policy.planner
        if planner is not None:
            if not self._base or len(self._base[0]) != len(next(iter(tree.values()))):
                self._base = list(np.swapaxes(planner.plan(tree, rng=self.rng), 0, 1))
            tree = {**tree, BASE_ACTION: self._base.pop(0)}
        if chunk.horizon == 1:
            action = self.agent.act(tree, greedy=greedy, rng=self.rng).action
            return action[0] if single else action
        if not self._plan or len(self._plan[0]) != len(next(iter(tree.values()))):
            chunks = np.asarray(self.agent.act(tree, greedy=greedy, rng=self.rng).action)
            self._plan = list(np.swapaxes(chunks.reshape(len(chunks), chunk.horizon, -1), 0, 1)[: chunk.execute])
        action = self._plan.pop(0)
        return action[0] if single else action

    def _batch(self, observation: Any) -> tuple[dict[str, Any], bool]:
        """The observation as a flat tree [N, ...], and whether it was a single one."""
        tree: dict[str, Any] = {}
        singles = set()
        for leaf in leaves_of(self.observation_space):
            value, shape = leaf.at(observation), leaf.shape
            if leaf.text:
                single = isinstance(value, str)
                tree[leaf.key] = [value] if single else list(value)
            else:
                value = np.asarray(value)
                single = value.ndim == len(shape)
                if value.shape[value.ndim - len(shape) :] != shape or value.ndim > len(shape) + 1:
                    raise UserError(f"{leaf.key!r} has shape {value.shape}; expected {shape}, or N of them")
                value = value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else value
                tree[leaf.key] = value[None] if single else value
            singles.add(single)
        if len(singles) > 1:
            raise UserError("some parts of the observation are of one environment and some of several")
        return tree, singles.pop()
