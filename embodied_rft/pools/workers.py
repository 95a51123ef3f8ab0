"""Environments in worker processes: shared memory for arrays, deadlines, and replacement of what hangs or crashes.

Boundary: knows the Pool protocol, not which environment a worker hosts: it gets a function that makes the pool of a
slice. A worker that misses a deadline or dies is killed and replaced; the step of its environments comes back with
valid False, and the rest of the run goes on. An environment that raises is met inside its worker (`singles`) and costs
nobody else. `worker_process` is the other end of the pipe.

Processes come from a fork server: a plain fork would copy the locks of torch's and MuJoCo's threads and the GL context
of a parent that has long been running, and spawn would pay for every import again each time a worker is replaced.

Legend: N environments, W workers; worker w hosts a contiguous slice of the N.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import ArrayLike

from embodied_rft.data import Action, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.pools.incidents import MAX_INCIDENTS, EnvironmentFailure, Incidents
from embodied_rft.pools.protocol import (
    Pool,
    Purpose,
    Seeding,
    StepResult,
    check_action,
    check_mask,
    check_seeds,
    field_of,
    fields_of,
)
from embodied_rft.pools.singles import DEADLINE, FIRST_TIME
from embodied_rft.pools.worker_process import Layout, SharedArrays, control_layout, layout_of, serve

START = 180.0  # seconds that a process may take to come up, beside what its environments take


@dataclass(slots=True)
class _Worker:
    envs: slice
    process: BaseProcess
    connection: Connection


class _StartError(Exception):
    """A worker did not come up: the error of its environment if there is one, and the text."""

    def __init__(self, kind: str, text: str, error: BaseException | None = None) -> None:
        super().__init__(text)
        self.kind, self.text, self.error = kind, text, error


class WorkerPool(Pool):
    """A Pool over W supervised processes; see the head of this file."""

    can_save: bool = False
    seeding: Seeding | None = None  # what seeds promise; None before the first reset

    def __init__(
        self,
        make_slice: Callable[..., Pool],
        num_envs: int,
        *,
        num_workers: int | None = None,
        purpose: Purpose = "training",
        deadline: float = DEADLINE,
        max_incidents: float = MAX_INCIDENTS,
        max_restarts: int = 3,
        preload: Sequence[str] = (),
    ) -> None:
        """Start the workers and wait until their environments stand.

        Args:
            make_slice: makes the Pool of `n` environments; called in the worker as `make_slice(n, watch=...,
                first=...)`.
            num_envs: N.
            num_workers: W; default one for each core, at most N.
            purpose: which seeds are accepted.
            deadline: seconds that a step or a reset of one environment may take before its worker counts as hanging.
            max_incidents: share of the latest episodes that may fail before EnvironmentFailure.
            max_restarts: how often in a row a new process may fail to come up before EnvironmentFailure.
            preload: modules that `make_slice` needs, imported once for all workers instead of by each.

        Raises:
            Exception: the environment's own error if it cannot be made.
            ValueError: the environment cannot be sent to a process, or /dev/shm is too small.
        """
        self.num_envs, self.purpose = num_envs, purpose
        self.deadline, self.max_restarts = deadline, max_restarts
        self.incidents = Incidents(max_incidents, num_envs)
        self._skips_images = False
        self._make_slice = _pickled(make_slice)
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._start(min(num_envs, num_workers or len(self._cores) or os.cpu_count() or 1))

    def _start(self, num_workers: int) -> None:
        """Launch W workers; of a pool that has none."""
        num_envs = self.num_envs
        self._cores_each = len(self._cores) // num_workers
        self._workers: list[_Worker] = []
        self._shared: list[
            SharedArrays
        ] = []  # what the workers are busy with; and the arrays, once the spaces are known
        self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._shared, os.getpid())
        self._shared.append(SharedArrays(control_layout(num_workers)))
        bounds = np.linspace(0, num_envs, num_workers + 1).astype(int).tolist()
        try:
            self._workers += [self._launch(w, slice(a, b)) for w, (a, b) in enumerate(itertools.pairwise(bounds))]
            ready = [self._await_ready(w) for w in range(num_workers)]
            self.observation_space, self.action_space, self.can_save = ready[0]
            self.fields = fields_of(self.observation_space)
            self.action_field = field_of("action", self.action_space)
            self._shared.append(SharedArrays(layout_of(self.observation_space, self.action_space, num_envs=num_envs)))
        except _StartError as failure:
            self.close()
            if failure.error is None:
                raise RuntimeError(f"a worker could not start ({failure.kind}): {failure.text}") from None
            failure.error.add_note(f"raised in a worker process:\n{failure.text}")
            raise failure.error from None
        except BaseException:
            self.close()
            raise
        self._serial = 0  # of the latest command
        self._seeds = np.zeros(num_envs, dtype=np.int64)  # of the running episodes, for messages
        self._idle = np.ones(num_envs, dtype=np.bool_)
        self._bad_start = np.zeros(num_envs, dtype=np.bool_)  # lost while being reset: the first step is invalid
        self._texts: dict[str, list[str]] = {k: [""] * num_envs for k, f in self.fields.items() if f.kind == "ragged"}
        self._reports_success = False
        self._exchange({w: ("attach", self._attachment()) for w in range(num_workers)})

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self._workers)

    @property
    def observation(self) -> Tree:
        """The current observation of all N (a copy); zeros before the first reset."""
        arrays = self._shared[1].arrays
        return {
            key: list(self._texts[key]) if key in self._texts else arrays[f"observation/{key}"].copy()
            for key in self.fields
        }

    def reset(self, seeds: ArrayLike, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes where `mask`; see `stepping.Pool`. Where a worker fails, the first step is invalid."""
        mask = check_mask(mask, num_envs=self.num_envs)
        seeds = check_seeds(seeds, mask, purpose=self.purpose)
        self._seeds = np.where(mask, seeds, self._seeds)
        self._bad_start &= ~mask
        slices = {w: worker.envs for w, worker in enumerate(self._workers) if mask[worker.envs].any()}
        arrays = self._shared[1].arrays
        arrays["seed"][:], arrays["begins"][:] = np.where(mask, seeds, 0), mask
        answers = self._exchange({w: ("reset", (options,)) for w in slices})
        for w, (texts, news, seeding) in answers.items():
            self._hear(w, texts, news)
            if seeding is not None and (self.seeding is None or self.seeding.held_out):
                self.seeding = seeding
        for w, envs in slices.items():
            if w not in answers:
                self._bad_start[envs] |= mask[envs]
        self._idle &= ~mask
        return self.observation

    def step(self, action: Action) -> StepResult:
        """Execute one action in every environment; see `stepping.StepResult`."""
        if self._idle.all():
            raise RuntimeError("no environment has a running episode: call reset before step")
        action = check_action(action, self.action_space, num_envs=self.num_envs)
        texts = action if isinstance(action, list) else None
        arrays = self._shared[1].arrays
        if texts is None:
            arrays["action"][:] = action
        arrays["valid"][:] = False  # whoever does not answer stays invalid
        idle, active = self._idle, ~(self._idle | self._bad_start)
        running = {w: worker.envs for w, worker in enumerate(self._workers) if active[worker.envs].any()}
        skip = self._skips_images
        answers = self._exchange({w: ("step", (None if texts is None else texts[s], skip)) for w, s in running.items()})
        for w, (observed, news, reports) in answers.items():
            self._hear(w, observed, news)
            self._reports_success |= reports
        answered = np.zeros(self.num_envs, dtype=np.bool_)
        for w in answers:
            answered[self._workers[w].envs] = True
        valid = arrays["valid"] & answered & active
        terminated, truncated = arrays["terminated"] & valid, arrays["truncated"] | ~valid
        info = {"success": arrays["success"] & valid} if self._reports_success else {}
        reward = np.where(valid, arrays["reward"], np.float32(0))
        self._idle, self._bad_start = terminated | truncated, np.zeros_like(idle)
        self.incidents.judge(ended=int((self._idle & valid).sum()), failed=int((~valid & ~idle).sum()))
        return StepResult(self.observation, reward, terminated, truncated, info, valid)

    def skip_images(self, skip: bool) -> None:
        """Whether workers may leave images as they were; see `VectorPool.skip_images`."""
        self._skips_images = skip

    def ask(self, name: str) -> Any:
        """What the first environment says under `name`; see `VectorPool.ask`."""
        return self._exchange({0: ("ask", (name,))}).get(0)

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The states of all workers, or None if the environments do not offer theirs."""
        if not self.can_save:
            return None
        answers = self._exchange({w: ("get_state", ()) for w in range(self.num_workers)})
        state = {
            "pool/idle": self._idle.copy(),
            "pool/bad_start": self._bad_start.copy(),
            "pool/reports_success": np.array(self._reports_success),
            "pool/num_workers": np.array(self.num_workers),
        }
        for w, answer in answers.items():
            state |= {f"worker/{w}/{key}": value for key, value in (answer or {}).items()}
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit from `get_state` of a pool of the same environments, on any number of cores.

        Episodes belong to the slices in which they run: this pool takes the number of workers of the state.
        """
        if len(state["pool/idle"]) != self.num_envs:
            raise UserError(
                f"the state is of {len(state['pool/idle'])} environments, this pool has {self.num_envs}: continue with "
                "the num_envs of the run that wrote it"
            )
        if int(state["pool/num_workers"]) != self.num_workers:
            self.close()
            self._start(int(state["pool/num_workers"]))
        requests = {}
        for w in range(self.num_workers):
            prefix = f"worker/{w}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:
                requests[w] = ("set_state", (own,))
        answers = self._exchange(requests)
        for w, texts in answers.items():
            self._hear(w, texts, None)
        self._idle = state["pool/idle"].astype(np.bool_)
        self._bad_start = state["pool/bad_start"].astype(np.bool_)
        for w in range(self.num_workers):
            if w not in answers:
                envs = self._workers[w].envs
                self._bad_start[envs] = ~self._idle[envs]
        self._reports_success = bool(state["pool/reports_success"])

    def close(self) -> None:
        """Stop the workers and remove the shared memory; a second call does nothing."""
        self._finalizer()

    def _hear(self, w: int, texts: dict[str, list[str]], news: tuple[dict[str, int], list[str]] | None) -> None:
        """Take the text observations and the incidents of an answer."""
        for key, value in texts.items():
            self._texts[key][self._workers[w].envs] = value
        if news is not None:
            self.incidents.take(*news)

    # --- supervision -------------------------------------------------------------------------------------------------

    def _launch(self, w: int, envs: slice) -> _Worker:
        ours, theirs = self._context.Pipe()
        control = self._shared[0]
        control.arrays["due"][w], control.arrays["busy"][w] = 0.0, -1
        share = self._cores[envs.start * len(self._cores) // self.num_envs :][: max(1, self._cores_each)]
        place = (w, envs.start, envs.stop - envs.start, (control.memory.name, control.layout), set(share))
        process = self._context.Process(
            target=serve, args=(theirs, self._make_slice, *place), daemon=True, name=f"environments {envs.start}"
        )
        process.start()
        theirs.close()
        return _Worker(envs, process, ours)

    def _await_ready(self, w: int) -> tuple[Space, Space, bool]:
        worker, end = self._workers[w], time.monotonic() + START
        while not worker.connection.poll(max(0.0, self._due(w, end) - time.monotonic())):
            if time.monotonic() >= self._due(w, end):
                raise _StartError(
                    "hang",
                    f"no sign of life within {max(START, FIRST_TIME * self.deadline):g} s of making it (env.deadline)",
                )
        try:
            answer, payload = worker.connection.recv()
        except (EOFError, OSError):
            raise _StartError("crash", _death(worker.process)) from None
        if answer == "failed":
            raise _StartError("error", payload[1], payload[0])
        promised: tuple[Space, Space, bool] = cloudpickle.loads(payload)
        return promised

    def _due(self, w: int, end: float) -> float:
        """When worker `w` counts as hanging: at `end`, or later where an environment may take longer."""
        return max(end, float(self._shared[0].arrays["due"][w]))

    def _attachment(self) -> tuple[str, Layout]:
        return self._shared[1].memory.name, self._shared[1].layout

    def _exchange(self, requests: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        """Send a command to some workers and collect the answers; who fails is replaced and is not in the result."""
        self._serial += 1
        answers: dict[int, Any] = {}
        failed: dict[int, tuple[str, str]] = {}
        waiting: dict[Any, int] = {}
        for w, request in requests.items():
            try:
                self._workers[w].connection.send((self._serial, *request))
                waiting[self._workers[w].connection] = w
            except OSError:
                failed[w] = ("crash", "")
        end = time.monotonic() + self.deadline
        while waiting:
            patience = min(self._due(w, end) for w in waiting.values()) - time.monotonic()
            ready = wait(list(waiting), timeout=max(0.0, patience))
            if not ready:
                for connection, w in list(waiting.items()):
                    if time.monotonic() >= self._due(w, end):
                        del waiting[connection]
                        failed[w] = ("hang", f"no answer within {self.deadline:g} s to {requests[w][0]} (env.deadline)")
            for connection in ready:
                w = waiting[connection]
                try:
                    serial, answer, payload = self._workers[w].connection.recv()
                except (EOFError, OSError):
                    serial, answer, payload = self._serial, "crash", ""
                if serial != self._serial:
                    continue  # the late answer to a command that Ctrl-C cut short
                del waiting[connection]
                if answer == "done":
                    answers[w] = payload
                else:
                    failed[w] = (answer, payload)
        for w, (kind, text) in failed.items():
            self._replace(w, kind, text)
        return answers

    def _replace(self, w: int, kind: str, text: str) -> None:
        """Kill worker `w` and put a fresh one in its place; its environments are idle until they are reset."""
        envs = self._workers[w].envs
        for _ in range(self.max_restarts + 1):
            busy = int(self._shared[0].arrays["busy"][w])
            _kill(self._workers[w])
            text = text or _death(self._workers[w].process)
            who = f"environment {busy} (seed {self._seeds[busy]}) in " if busy >= 0 else ""
            self.incidents.add(kind, f"{who}worker {w} (environments {envs.start} to {envs.stop - 1}): {text}")
            self._workers[w] = self._launch(w, envs)
            try:
                self._await_ready(w)
            except _StartError as failure:
                kind, text = failure.kind, failure.text
            else:
                self._exchange({w: ("attach", self._attachment())})
                return
        self.close()
        raise EnvironmentFailure(
            f"worker {w} could not be replaced, {self.max_restarts + 1} times; the last time, {kind}: {text}\n"
            "Use the pool kind 'sync' to meet the error in this process."
        )


def _pickled(make_slice: Callable[..., Pool]) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(make_slice)
        return pickled
    except Exception as error:
        raise UserError(
            f"this environment cannot be sent to worker processes ({type(error).__name__}: {error}). Register it as "
            "'module:Class', with options that are plain data, or use the pool kind 'sync'."
        ) from error


def _death(process: BaseProcess) -> str:
    """How a process ended, for people."""
    process.join(timeout=5)
    code = process.exitcode
    if code is None:
        return "closed its connection but is still alive"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _kill(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.join(timeout=0.05)  # a crash keeps its own exit code
    worker.process.kill()
    worker.process.join()


def _shut_down(workers: list[_Worker], shared: list[SharedArrays], owner: int) -> None:
    """Ask politely, then kill; remove the shared memory. Does nothing in a forked copy of the owner."""
    if os.getpid() != owner:
        return
    for worker in workers:
        with suppress(OSError, ValueError):
            worker.connection.send((0, "close", ()))
    end = time.monotonic() + 2.0
    for worker in workers:
        worker.process.join(timeout=max(0.0, end - time.monotonic()))
        _kill(worker)
    for arrays in shared:
        arrays.close()
    workers.clear()
    shared.clear()
