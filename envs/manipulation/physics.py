"""Physics engines: step many MuJoCo states at once. Knows models and states, nothing of tasks, goals or rewards.

Two engines with one interface:

- `ExactEngine` steps row by row on Python threads and keeps each environment's solver warm start: it computes, bit by
  bit, what an ordinary single environment computes, at nearly the speed of `mj_step` alone (benchmarks/env_steps.py).
- `RolloutEngine` hands the whole batch to `mujoco.rollout`, which steps it on native threads without Python in
  between: no global lock, so for machines with many cores. MuJoCo does not return the warm start from a rollout, so
  every call starts the solver cold: one step differs by about 1e-13, and chaotic contact (a tilting puck) doubles
  that every step.

Shapes: N environments, K of them selected by `rows`, S numbers of physics state (`mjSTATE_FULLPHYSICS`: time, qpos,
qvel, act), C numbers of control (`control_spec`), M sensor readings, V degrees of freedom.

`mj_step` integrates at its very end, so sensor readings after a step belong to the state *before* the last substep,
exactly as `MjData.xpos` does. A task that wants the readings of the final state says so with `settle`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
from mujoco import rollout

from embodied_rft.names import UserError, nearest

PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS.value
ENGINES = ("rollout", "exact")

Settle = Callable[[np.ndarray], None]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Engine:
    """What every engine has.

    Args:
        model: the compiled model; never modified.
        num_envs: N.
        num_substeps: `mj_step` calls in one environment step.
        control_spec: `mjtState` bits that a control row holds, for example CTRL | MOCAP_POS | MOCAP_QUAT.
        num_threads: threads to step with; None takes one a core.
        settle: changes final physics [K, S] in place after the substeps (Fetch closes its fingers there); readings
            are then taken from the settled state. None: nothing is changed and readings lag by one substep.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        *,
        num_envs: int,
        num_substeps: int,
        control_spec: int,
        num_threads: int | None = None,
        settle: Settle | None = None,
    ) -> None:
        self.model, self.settle, self.num_envs = model, settle, num_envs
        self.num_substeps, self.control_spec = num_substeps, control_spec
        self.num_threads = min(num_threads or num_cores(), num_envs)
        self._data = [mujoco.MjData(model) for _ in range(self.num_threads)]


class ExactEngine(Engine):
    """N states stepped one by one with `mj_step` on Python threads (it releases the GIL), solver warm start kept.

    Each thread has one `MjData`, hot in its cache: an environment's physics and warm start are loaded, stepped and
    stored. Nothing else in an `MjData` outlives a step, so this equals one persistent `MjData` for each environment
    bit by bit.
    """

    def __init__(self, model: mujoco.MjModel, **options: Any) -> None:
        super().__init__(model, **options)
        self.warmstart = np.zeros((self.num_envs, model.nv))
        self._pool: ThreadPoolExecutor | None = None  # made on first use, so that a forked copy has its own

    def reset(self, rows: np.ndarray, physics: np.ndarray, controls: np.ndarray) -> np.ndarray:
        """Put environments `rows` into `physics` [K, S] under `controls` [K, C]; gives the readings [K, M] there."""
        data, sensors = self._data[0], np.empty((len(rows), self.model.nsensordata))
        for k, row in enumerate(rows):
            sensors[k] = forward(self.model, data, physics[k], controls[k], self.control_spec)
            self.warmstart[row] = data.qacc_warmstart
        return sensors

    def step(self, rows: np.ndarray, physics: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One environment step of `rows` under `controls` [K, C]: new physics [K, S] and readings [K, M]."""
        after, sensors = physics.copy(), np.empty((len(rows), self.model.nsensordata))
        if self.num_threads == 1 or len(rows) == 1:
            self._run(self._data[0], iter(range(len(rows))), rows, after, controls, sensors)
            return after, sensors
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="physics")
        todo = iter(range(len(rows)))  # shared: a thread takes the next row when it is free
        jobs = [self._pool.submit(self._run, data, todo, rows, after, controls, sensors) for data in self._data]
        for job in jobs:
            job.result()
        return after, sensors

    def _run(
        self,
        data: mujoco.MjData,
        todo: Iterator[int],
        rows: np.ndarray,
        physics: np.ndarray,
        controls: np.ndarray,
        sensors: np.ndarray,
    ) -> None:
        """Step rows from `todo` until none is left; writes `physics`, `sensors` and the warm start in place."""
        model = self.model
        for k in todo:
            mujoco.mj_setState(model, data, physics[k], PHYSICS)
            mujoco.mj_setState(model, data, controls[k], self.control_spec)
            data.qacc_warmstart = self.warmstart[rows[k]]
            mujoco.mj_step(model, data, nstep=self.num_substeps)
            mujoco.mj_getState(model, data, physics[k], PHYSICS)
            if self.settle is not None:
                self.settle(physics[k : k + 1])
                mujoco.mj_setState(model, data, physics[k], PHYSICS)
                mujoco.mj_forward(model, data)
            sensors[k] = data.sensordata
            self.warmstart[rows[k]] = data.qacc_warmstart

    def get_warmstart(self) -> np.ndarray:
        """Solver warm start of every environment, [N, V]."""
        return self.warmstart.copy()

    def set_warmstart(self, warmstart: np.ndarray | None) -> None:
        """Continue from `warmstart` [N, V]."""
        if warmstart is None:
            raise UserError(
                "this state has no 'warmstart': it was saved by engine='rollout', and engine='exact' cannot continue "
                "from it exactly. Make the environment with engine='rollout'."
            )
        self.warmstart[:] = warmstart

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class RolloutEngine(Engine):
    """A batch of states stepped by `mujoco.rollout` on native threads; methods as in `ExactEngine`.

    Keeps no state between calls, so a row's result depends on nothing but its own physics and controls: neither on the
    other rows nor on the number of threads.
    """

    def __init__(self, model: mujoco.MjModel, **options: Any) -> None:
        super().__init__(model, **options)
        num_state = mujoco.mj_stateSize(model, PHYSICS)
        num_control = mujoco.mj_stateSize(model, self.control_spec)
        self._models = [model] * self.num_envs
        self._rollout: rollout.Rollout | None = None  # made on first use, so that a forked copy has its own threads
        # Buffers of the native call; MuJoCo writes every substep, we read the last one.
        self._controls = np.empty((self.num_envs, self.num_substeps, num_control))
        self._physics = np.empty((self.num_envs, self.num_substeps, num_state))
        self._sensors = np.empty((self.num_envs, self.num_substeps, model.nsensordata))

    def reset(self, rows: np.ndarray, physics: np.ndarray, controls: np.ndarray) -> np.ndarray:
        """Readings [K, M] of `physics` [K, S] with `controls` [K, C] applied."""
        data = self._data[0]
        return np.stack([forward(self.model, data, p, c, self.control_spec) for p, c in zip(physics, controls)])

    def step(self, rows: np.ndarray, physics: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One environment step of `physics` [K, S] under `controls` [K, C]: new physics, and readings [K, M]."""
        states, sensors = self._call(physics, controls, self.num_substeps)
        after = states[:, -1].copy()
        if self.settle is not None:
            self.settle(after)
            _, sensors = self._call(after, controls, 1)  # a step evaluates its sensors before it moves
        return after, sensors[:, -1].copy()

    def _call(self, physics: np.ndarray, controls: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        num = len(physics)
        if self._rollout is None:
            self._rollout = rollout.Rollout(nthread=self.num_threads if self.num_threads > 1 else 0)
        # A shorter call borrows the head of each buffer: the native side wants it dense.
        control, state, sensor = (
            buffer.reshape(-1)[: num * num_steps * buffer.shape[2]].reshape(num, num_steps, buffer.shape[2])
            for buffer in (self._controls, self._physics, self._sensors)
        )
        control[:] = controls[:, None]
        self._rollout.rollout(
            self._models[:num],
            self._data,
            np.ascontiguousarray(physics),
            control,
            control_spec=self.control_spec,
            skip_checks=True,
            nstep=num_steps,
            state=state,
            sensordata=sensor,
            chunk_size=1,
        )
        return state, sensor

    def get_warmstart(self) -> np.ndarray | None:
        """None: a rollout starts its solver cold."""
        return None

    def set_warmstart(self, warmstart: np.ndarray | None) -> None:
        """Nothing to do: a rollout starts its solver cold."""

    def close(self) -> None:
        """Stop the threads."""
        if self._rollout is not None:
            self._rollout.close()
            self._rollout = None


def make_engine(name: str, model: mujoco.MjModel, **options: object) -> ExactEngine | RolloutEngine:
    """The engine called `name` ("rollout" or "exact"). Raises ValueError with the nearest name."""
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}; {nearest(str(name), ENGINES)}")
    return (RolloutEngine if name == "rollout" else ExactEngine)(model, **options)


def forward(
    model: mujoco.MjModel, data: mujoco.MjData, physics: np.ndarray, controls: np.ndarray, control_spec: int
) -> np.ndarray:
    """Put `data` into a fresh state (nothing of its past is left) and give the sensor readings [M] there."""
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, physics, PHYSICS)
    mujoco.mj_setState(model, data, controls, control_spec)
    mujoco.mj_forward(model, data)
    return data.sensordata.copy()


def sensor_slices(model: mujoco.MjModel) -> dict[str, slice]:
    """Where each named sensor lies in a reading: {"grip": slice(0, 3), ...}."""
    return {
        model.sensor(i).name: slice(int(model.sensor_adr[i]), int(model.sensor_adr[i] + model.sensor_dim[i]))
        for i in range(model.nsensor)
    }
