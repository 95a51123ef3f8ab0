"""Environments in worker processes: shared memory for arrays, deadlines, and replacement of what hangs or crashes.

Boundary: knows the Pool protocol, not which environment a worker hosts: it gets a function that makes the pool of a
slice. A worker that misses its deadline, dies or raises is killed and replaced; the step of its environments comes back
with valid False, and the rest of the run goes on. `worker_process` is the other end of the pipe.

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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Tree
from embodied_rft.stepping import (
    Incidents,
    Pool,
    Purpose,
    StepResult,
    check_action,
    check_mask,
    check_seeds,
    field_of,
    fields_of,
)
from embodied_rft.worker_process import Layout, SharedArrays, layout_of, serve

HEALTHY_STEPS = 100  # a worker that answered so many steps since it was replaced counts as healthy again


@dataclass(slots=True)
class _Worker:
    envs: slice
    process: BaseProcess
    connection: Connection
    failures: int = 0  # since it was last healthy
    good_steps: int = 0


class _StartError(Exception):
    """A worker did not come up: the error of its environment if there is one, and the text."""

    def __init__(self, kind: str, text: str, error: BaseException | None = None) -> None:
        super().__init__(text)
        self.kind, self.text, self.error = kind, text, error


class WorkerPool:
    """A Pool over W supervised processes; see the head of this file."""

    def __init__(
        self,
        make_slice: Callable[[int], Pool],
        num_envs: int,
        *,
        num_workers: int | None = None,
        purpose: Purpose = "training",
        deadline: float = 60.0,
        start_deadline: float = 180.0,
        max_restarts: int = 3,
    ) -> None:
        """Start the workers and wait until their environments stand.

        Args:
            make_slice: picklable function that makes the Pool of `n` environments; runs in the worker.
            num_envs: N.
            num_workers: W; default one for each core, at most N.
            purpose: which seeds are accepted.
            deadline: seconds that a step or a reset may take before the worker counts as hanging.
            start_deadline: seconds that making the environments may take.
            max_restarts: how often in a row a worker is replaced (100 good steps end the row) before RuntimeError.

        Raises:
            Exception: the environment's own error if it cannot be made.
        """
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        num_workers = min(num_envs, num_workers or len(self._cores) or os.cpu_count() or 1)
        self._cores_each = len(self._cores) // num_workers
        self.num_envs, self.purpose = num_envs, purpose
        self.deadline, self.start_deadline, self.max_restarts = deadline, start_deadline, max_restarts
        self.incidents = Incidents()
        self._make_slice = make_slice
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["embodied_rft.pool"])
        self._workers: list[_Worker] = []
        self._shared: list[SharedArrays] = []  # empty until the spaces are known, then one
        self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._shared, os.getpid())
        bounds = np.linspace(0, num_envs, num_workers + 1).astype(int).tolist()
        try:
            self._workers += [self._launch(slice(a, b)) for a, b in itertools.pairwise(bounds)]
            ready = [self._await_ready(worker) for worker in self._workers]
        except _StartError as failure:
            self.close()
            if failure.error is None:
                raise RuntimeError(f"a worker could not start ({failure.kind}): {failure.text}") from None
            failure.error.add_note(f"raised in a worker process:\n{failure.text}")
            raise failure.error from None
        self.observation_space, self.action_space, self.can_save = ready[0]
        self.fields = fields_of(self.observation_space)
        self.action_field = field_of("action", self.action_space)
        self._shared.append(SharedArrays(layout_of(self.observation_space, self.action_space, num_envs=num_envs)))
        self._serial = 0  # of the latest command
        self._idle = np.ones(num_envs, dtype=np.bool_)
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
        arrays = self._shared[0].arrays
        return {
            key: list(self._texts[key]) if key in self._texts else arrays[f"observation/{key}"].copy()
            for key in self.fields
        }

    def reset(self, seeds: Any, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes where `mask`; see `stepping.Pool`. A worker that fails is replaced and asked again."""
        mask = check_mask(mask, num_envs=self.num_envs)
        seeds = check_seeds(seeds, mask, purpose=self.purpose)
        pending = [w for w, worker in enumerate(self._workers) if mask[worker.envs].any()]
        while pending:
            slices = {w: self._workers[w].envs for w in pending}
            answers = self._exchange({w: ("reset", (seeds[s], mask[s], options)) for w, s in slices.items()})
            for w, (texts, news) in answers.items():
                self._hear(w, texts, news)
            pending = [w for w in pending if w not in answers]
        self._idle &= ~mask
        return self.observation

    def step(self, action: Any) -> StepResult:
        """Execute one action in every environment; see `stepping.StepResult`."""
        if self._idle.all():
            raise RuntimeError("no environment has a running episode: call reset before step")
        action = check_action(action, self.action_space, num_envs=self.num_envs)
        texts = action if isinstance(action, list) else None
        arrays = self._shared[0].arrays
        if texts is None:
            arrays["action"][:] = action
        arrays["valid"][:] = False  # whoever does not answer stays invalid
        running = {w: worker.envs for w, worker in enumerate(self._workers) if not self._idle[worker.envs].all()}
        answers = self._exchange({w: ("step", (None if texts is None else texts[s],)) for w, s in running.items()})
        for w, (observed, news, reports) in answers.items():
            self._hear(w, observed, news)
            self._reports_success |= reports
            self._workers[w].good_steps += 1
            if self._workers[w].good_steps >= HEALTHY_STEPS:
                self._workers[w].failures = 0
        answered = np.zeros(self.num_envs, dtype=np.bool_)
        for w in answers:
            answered[self._workers[w].envs] = True
        valid = arrays["valid"] & answered & ~self._idle
        terminated, truncated = arrays["terminated"] & valid, arrays["truncated"] | ~valid
        self._idle = terminated | truncated
        info = {"success": arrays["success"] & valid} if self._reports_success else {}
        reward = np.where(valid, arrays["reward"], np.float32(0))
        return StepResult(self.observation, reward, terminated, truncated, info, valid)

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The states of all workers, or None if the environments do not offer theirs."""
        if not self.can_save:
            return None
        answers = self._exchange({w: ("get_state", ()) for w in range(self.num_workers)})
        state = {
            "pool/idle": self._idle.copy(),
            "pool/reports_success": np.array(self._reports_success),
            "pool/num_workers": np.array(self.num_workers),
        }
        for w, answer in answers.items():
            state |= {f"worker/{w}/{key}": value for key, value in (answer or {}).items()}
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit from `get_state` of a pool of the same environments and number of workers."""
        shape = (len(state["pool/idle"]), int(state.get("pool/num_workers", 0)))
        if shape != (self.num_envs, self.num_workers):
            raise ValueError(
                f"the state is of (environments, workers) {shape}, this pool has {(self.num_envs, self.num_workers)}: "
                "continue with the num_envs and num_workers of the run that wrote it"
            )
        requests = {}
        for w in range(self.num_workers):
            prefix = f"worker/{w}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:
                requests[w] = ("set_state", (own,))
        answers = self._exchange(requests)
        for w, texts in answers.items():
            self._hear(w, texts, [])
        self._idle = state["pool/idle"].astype(np.bool_)
        for w in range(self.num_workers):
            if w not in answers:
                self._idle[self._workers[w].envs] = True
        self._reports_success = bool(state["pool/reports_success"])

    def close(self) -> None:
        """Stop the workers and remove the shared memory; a second call does nothing."""
        self._finalizer()

    def _hear(self, w: int, texts: dict[str, list[str]], news: list[str]) -> None:
        """Take the text observations and the incidents of an answer."""
        envs = self._workers[w].envs
        for key, value in texts.items():
            self._texts[key][envs] = value
        for text in news:
            kind, _, what = text.partition(": ")
            self.incidents.add(kind, f"worker {w} (environments {envs.start} to {envs.stop - 1}): {what}")

    # --- supervision -------------------------------------------------------------------------------------------------

    def _launch(self, envs: slice) -> _Worker:
        ours, theirs = self._context.Pipe()
        count = envs.stop - envs.start
        share = self._cores[envs.start * len(self._cores) // self.num_envs :][: max(1, self._cores_each)]
        arguments = (theirs, self._make_slice, envs.start, count, 2 * self.deadline, set(share))
        process = self._context.Process(target=serve, args=arguments, daemon=True, name=f"environments {envs.start}")
        process.start()
        theirs.close()
        return _Worker(envs, process, ours)

    def _await_ready(self, worker: _Worker) -> tuple[spaces.Space, spaces.Space, bool]:
        if not worker.connection.poll(self.start_deadline):
            raise _StartError("hang", f"no sign of life after {self.start_deadline:g} s")
        try:
            answer, payload = worker.connection.recv()
        except (EOFError, OSError):
            raise _StartError("crash", _death(worker.process)) from None
        if answer == "failed":
            raise _StartError("error", payload[1], payload[0])
        return payload

    def _attachment(self) -> tuple[str, Layout]:
        return self._shared[0].memory.name, self._shared[0].layout

    def _exchange(self, requests: dict[int, tuple[str, tuple]]) -> dict[int, Any]:
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
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                hang = f"no answer within {self.deadline:g} s to "
                failed |= {w: ("hang", hang + requests[w][0]) for w in waiting.values()}
                break
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
        old = self._workers[w]
        failures = old.failures
        while True:
            _kill(self._workers[w])
            failures += 1
            text = text or _death(self._workers[w].process)
            self.incidents.add(kind, f"worker {w} (environments {old.envs.start} to {old.envs.stop - 1}): {text}")
            if failures > self.max_restarts:
                self.close()
                raise RuntimeError(
                    f"worker {w} failed {failures} times without {HEALTHY_STEPS} good steps in between; "
                    f"the last time, {kind}: {text}\nUse the pool kind 'sync' to meet the error in this process."
                )
            self._workers[w] = self._launch(old.envs)
            try:
                self._await_ready(self._workers[w])
                break
            except _StartError as failure:
                kind, text = failure.kind, failure.text
        self._workers[w].failures = failures
        self._idle[old.envs] = True
        self._exchange({w: ("attach", self._attachment())})


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
