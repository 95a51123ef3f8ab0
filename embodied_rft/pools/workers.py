"""Environments in worker processes: shared memory for arrays, deadlines, and replacement of what hangs or crashes.

Boundary: knows hosts, not which environment a worker has: it gets a function that makes the host of a slice. A worker
that misses a deadline or dies is killed and replaced; its environments have failed until they are reset, and the rest
of the run goes on. An environment that raises is met inside its worker (`singles`) and costs nobody else.
`worker_process` is the other end of the pipe.

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

from embodied_rft.data import Action, Space
from embodied_rft.names import UserError
from embodied_rft.pools.answers import leaves_of
from embodied_rft.pools.hosts import DEADLINE, FIRST_TIME, Answer, Host
from embodied_rft.pools.incidents import EnvironmentFailure
from embodied_rft.pools.protocol import merge
from embodied_rft.pools.worker_process import SIGNALS, Layout, SharedArrays, control_layout, layout_of, serve

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


class Workers(Host):
    """N environments in W supervised processes; see the head of this file."""

    can_save: bool = False

    def __init__(
        self,
        make_slice: Callable[..., Host],
        num_envs: int,
        *,
        num_workers: int | None = None,
        deadline: float = DEADLINE,
        max_restarts: int = 3,
        preload: Sequence[str] = (),
        first: int = 0,
    ) -> None:
        """Start the workers and wait until their environments stand.

        Args:
            make_slice: makes the host of `n` environments; called in the worker as `make_slice(n, watch=...,
                first=...)`.
            num_envs: N.
            num_workers: W; default one for each core, at most N.
            deadline: seconds that a step or a reset of one environment may take before its worker counts as hanging.
            max_restarts: how often in a row a new process may fail to come up before EnvironmentFailure.
            preload: modules that `make_slice` needs, imported once for all workers instead of by each.
            first: number of the first environment, for messages.

        Raises:
            Exception: the environment's own error if it cannot be made.
            ValueError: the environment cannot be sent to a process, or /dev/shm is too small.
        """
        self.num_envs, self.deadline, self.max_restarts, self.first = num_envs, deadline, max_restarts, first
        self._skips_images = False
        self._incidents: list[tuple[str, str]] = []  # that no answer has told yet
        self._make_slice = _pickled(make_slice)
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._cores = own_cores()
        self._start(min(num_envs, num_workers or num_cores()))

    def _start(self, num_workers: int) -> None:
        """Launch W workers, where there are none."""
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
        self._lost = np.zeros(num_envs, dtype=np.bool_)  # with their process, until they are reset
        self.leaves = leaves_of(self.observation_space)
        self.observation = {leaf.key: leaf.empty(num_envs) for leaf in self.leaves}
        self._exchange({w: ("attach", self._attachment()) for w in range(num_workers)})

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self._workers)

    def reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> Answer:
        """New episodes where `mask`; where a worker fails, they are lost."""
        self._seeds = np.where(mask, seeds, self._seeds)
        self._lost &= ~mask
        self._shared[1].arrays["seed"][:] = seeds
        return self._round(mask, "reset", lambda _: (options,))

    def step(self, action: Action, running: np.ndarray) -> Answer:
        """One step of those that are `running` [N]."""
        texts = action if isinstance(action, list) else None
        if texts is None:
            self._shared[1].arrays["action"][:] = action
        told = self._skips_images
        return self._round(running, "step", lambda envs: (None if texts is None else texts[envs], told))

    def _round(self, rows: np.ndarray, command: str, arguments: Callable[[slice], tuple[Any, ...]]) -> Answer:
        """A command for environments `rows` [N] but those that are lost: what all workers answered."""
        arrays, asked = self._shared[1].arrays, rows & ~self._lost
        arrays["rows"][:] = asked
        busy = [(w, worker.envs) for w, worker in enumerate(self._workers) if asked[worker.envs].any()]
        answers = self._exchange({w: (command, arguments(envs)) for w, envs in busy})
        new: dict[str, Any] = {
            e.key: e.empty(len(rows)) if e.text else arrays[f"observation/{e.key}"] for e in self.leaves
        }
        told, incidents = False, list[tuple[str, str]]()
        statistics: list[tuple[slice, dict[str, np.ndarray]]] = []
        for w, (texts, found, reports, noted, seeding) in answers.items():
            told, incidents = told or reports, incidents + found
            statistics.append((self._workers[w].envs, noted))
            for key, value in texts.items():
                new[key][self._workers[w].envs] = value
            if seeding is not None and (self.seeding is None or self.seeding.held_out):
                self.seeding = seeding
        observation = {k: v.copy() for k, v in new.items()} if asked.all() else merge(asked, new, self.observation)
        signals: Any = {name: np.where(asked, arrays[name], arrays[name].dtype.type(0)) for name in SIGNALS}
        answer = Answer(observation, **signals, told=told, incidents=self._incidents + incidents)
        answer.failed |= rows & self._lost
        for envs, noted in statistics:
            for name, values in noted.items():
                answer.note(name, envs, values)
        self._incidents = []
        return answer

    def skip_images(self, skip: bool) -> None:
        """Said with the next step."""
        self._skips_images = skip

    def ask(self, name: str) -> object:
        """What the first environment says."""
        return self._exchange({0: ("ask", (name,))}).get(0)

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The states of all workers, or None if the environments do not offer theirs."""
        answers = self._exchange({w: ("get_state", ()) for w in range(self.num_workers)}) if self.can_save else {}
        if not answers or None in answers.values():
            return None
        state = {"workers/count": np.array(self.num_workers)}
        for w, answer in answers.items():
            state |= {f"workers/{w}/{key}": value for key, value in answer.items()}
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state`, on any number of cores.

        Episodes belong to the slices in which they run: this host takes the number of workers of the state.
        """
        if int(state["workers/count"]) != self.num_workers:
            self.close()
            self._start(int(state["workers/count"]))
        requests: dict[int, tuple[str, tuple[Any, ...]]] = {}
        for w in range(self.num_workers):
            prefix = f"workers/{w}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            requests |= {w: ("set_state", (own,))} if own else {}
        answers = self._exchange(requests)
        for w, worker in enumerate(self._workers):
            self._lost[worker.envs] = w not in answers

    def save(self, row: int) -> object:
        """Asked of its worker."""
        return self._of_one(row, "save", ())

    def restore(self, row: int, saved: object) -> None:
        """Told to its worker."""
        self._of_one(row, "restore", (saved,))

    def _of_one(self, row: int, command: str, arguments: tuple[Any, ...]) -> object:
        """A command for one environment; UserError if its worker failed."""
        w = next(w for w, worker in enumerate(self._workers) if worker.envs.start <= row < worker.envs.stop)
        answers = self._exchange({w: (command, (row - self._workers[w].envs.start, *arguments))})
        if w not in answers:
            raise UserError(f"the worker of environment {row} failed while it was to {command} it")
        return answers[w]

    def close(self) -> None:
        """Stop the workers and remove the shared memory; a second call does nothing."""
        self._finalizer()

    # --- supervision -------------------------------------------------------------------------------------------------

    def _launch(self, w: int, envs: slice) -> _Worker:
        ours, theirs = self._context.Pipe()
        control = self._shared[0]
        control.arrays["due"][w], control.arrays["busy"][w] = 0.0, -1
        share = self._cores[envs.start * len(self._cores) // self.num_envs :][: max(1, self._cores_each)]
        place = (w, envs.start, envs.stop - envs.start, self.first, (control.memory.name, control.layout), set(share))
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
        """Kill worker `w` and put a fresh one in its place; its environments are lost until they are reset."""
        envs = self._workers[w].envs
        self._lost[envs] = True
        for _ in range(self.max_restarts + 1):
            busy = int(self._shared[0].arrays["busy"][w])
            _kill(self._workers[w])
            text = text or _death(self._workers[w].process)
            who = f"environment {self.first + busy} (seed {self._seeds[busy]}) in " if busy >= 0 else ""
            where = f"{who}worker {w} (environments {self.first + envs.start} to {self.first + envs.stop - 1})"
            self._incidents.append((kind, f"{where}: {text}"))
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


def own_cores() -> list[int]:
    """Numbers of the cores that this process may use; [] where the operating system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def num_cores() -> int:
    """How many these are."""
    return len(own_cores()) or os.cpu_count() or 1


def _pickled(make_slice: Callable[..., Host]) -> bytes:
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
