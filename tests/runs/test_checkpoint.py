"""Checkpoints: exact, atomic, survivors of truncation, full disks and killed writers; one process a run folder."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from embodied_rft.buffer.trajectories import FORMAT
from embodied_rft.data import Ragged
from embodied_rft.runs import checkpoint
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.lock import RunLock, _held_locks
from embodied_rft.runs.tree_file import (
    MANIFEST,
    META,
    TENSORS,
    CheckpointError,
    load,
    save,
)

NUMBERS = "bool uint8 int8 int16 uint16 float16 int32 uint32 float32 int64 uint64 float64 complex64".split()


def same(a, b):
    """Equal to the last bit, NaN included, and of the same type; a bare NaN is any NaN (JSON has one)."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert bytes(a.contiguous().reshape(-1).view(torch.uint8)) == bytes(
            b.resolve_conj().reshape(-1).view(torch.uint8)
        )
    elif isinstance(a, (np.ndarray, np.generic)):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    elif isinstance(a, Ragged):
        same(a.values, b.values)
        same(a.offsets, b.offsets)
    elif isinstance(a, float):
        assert np.float64(a).tobytes() == np.float64(b).tobytes() or (np.isnan(a) and np.isnan(b))
    else:
        assert a == b


def sample_state():
    generator = np.random.default_rng(3)
    weight = torch.randn(5, 7)
    return {
        "tensors": {
            name: (torch.arange(12) % 2).reshape(3, 4).to(getattr(torch, name)) for name in (*NUMBERS, "bfloat16")
        },
        "float8": [torch.randn(4).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)],
        "conjugate": torch.view_as_complex(torch.randn(3, 2)).conj(),
        "arrays": {name: np.arange(6).reshape(2, 3).astype(name) for name in NUMBERS},
        "read-only": np.frombuffer(b"abcd", np.uint8),
        "views": [
            weight.T,
            weight[::2],
            weight,
            torch.zeros(0, 3),
            torch.tensor(2.5),
            np.zeros((0, 2)),
            np.arange(9)[::2],
        ],
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "groups": [{"betas": (0.9, 0.999), "lr": 3e-4}],
        },
        "rng": generator.bit_generator.state,
        "torch_rng": torch.get_rng_state(),
        "numbers": [0.1, -0.0, float("nan"), float("inf"), 2**130 + 1, True, None, np.float32(0.3), np.bool_(True)],
        "bytes": b"\x00\xff raw",
        "text": np.array([["push", "the cube"], ["", "ünïcode"]]),
        "$odd key": {"$tensor": "not a reference"},
        "ragged": Ragged.of([[7, 8], [], [9]]),
    }


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    state = sample_state()
    save(tmp_path / "c", state)
    same(load(tmp_path / "c"), state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
        | hnp.arrays(st.sampled_from(["?", "u1", "i2", "u8", "f4", "f8"]), hnp.array_shapes(min_dims=0, min_side=0)),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
        max_leaves=12,
    )
)  # fmt: skip
def test_any_tree_comes_back(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("tree") / "c"
    save(folder, tree)
    same(load(folder), tree)


def test_the_tensor_file_is_a_valid_safetensors_file(tmp_path):
    save(tmp_path / "c", {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)})
    with safe_open(tmp_path / "c" / TENSORS, framework="pt") as file:
        tensors = [file.get_tensor(key) for key in sorted(file.keys())]
    assert torch.equal(tensors[0], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tensors[1], torch.ones(3, dtype=torch.bfloat16))


def test_what_shares_memory_is_saved_for_each_and_loaded_for_each(tmp_path):
    weight = torch.randn(4, 3)
    state = {"a": weight, "tied": weight, "part": weight[1:], "turned": weight.T, "array": weight.numpy()}
    save(tmp_path / "c", state)
    loaded = load(tmp_path / "c")
    same(loaded, state)
    shutil.rmtree(tmp_path / "c")  # what was loaded needs the file no more
    loaded["a"].zero_()
    loaded["array"][:] = 1
    assert torch.equal(loaded["tied"], weight) and torch.equal(loaded["part"], weight[1:])


def test_loaded_generators_continue_exactly(tmp_path):
    generator = np.random.default_rng(1)
    generator.normal(size=10)
    save(tmp_path / "c", generator.bit_generator.state)
    expected = generator.normal(size=5)
    again = np.random.default_rng(0)
    again.bit_generator.state = load(tmp_path / "c")
    assert np.array_equal(again.normal(size=5), expected)


@pytest.mark.parametrize(
    "leaf",
    [object(), {1, 2}, np.array([object()]), np.zeros(2, ">f4"), np.zeros(2, "c16"), torch.eye(2).to_sparse()],
)
def test_what_has_no_exact_form_is_refused_by_path(tmp_path, leaf):
    with pytest.raises(ValueError, match=r"cannot save agent\.2\.part"):
        save(tmp_path / "c", {"agent": [1, 2, {"part": leaf}]})
    assert list(tmp_path.iterdir()) == []


def damage_truncate(folder):
    path = folder / TENSORS
    os.truncate(path, path.stat().st_size // 2)


def damage_flip(folder):
    path = folder / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_meta(folder):
    os.truncate(folder / META, 5)


def damage_manifest(folder):
    os.truncate(folder / MANIFEST, 5)


def damage_missing(folder):
    (folder / META).unlink()


def damage_emptied_manifest(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": {}}))


def damage_list_for_manifest(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": [1]}))


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_meta,
        damage_manifest,
        damage_missing,
        damage_emptied_manifest,
        damage_list_for_manifest,
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.write(step, {"step": step, "w": torch.full((100,), float(step))})
    damage(checkpoints.path(2))
    with pytest.raises(CheckpointError, match="000000000002"):
        load(checkpoints.path(2))
    with caplog.at_level(logging.WARNING):
        step, tree = checkpoints.newest()
    assert step == 1 and tree["step"] == 1 and tree["w"][0] == 1.0
    assert "checkpoint 2 cannot be used" in caplog.text
    damage(checkpoints.path(1))
    with pytest.raises(CheckpointError, match="begin anew"):
        checkpoints.newest()


def rewrite(folder, name, content):
    """Put forged bytes into a checkpoint under a manifest that agrees with them."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


FORGED = {
    "a list for a manifest": lambda f: (f / MANIFEST).write_text("[1, 2]"),
    "no files in it": lambda f: (f / MANIFEST).write_text('{"format": 1}'),
    "a name for a number": lambda f: (f / MANIFEST).write_text('{"format": 1, "files": 3}'),
    "nested without end": lambda f: (f / MANIFEST).write_text("[" * 200_000),
    "another tree": lambda f: rewrite(f, META, b'{"format": 1, "tree": {"w": 1}}'),
    "no tree": lambda f: rewrite(f, META, b'{"format": 1, "tree": 3}'),
    "a tree without end": lambda f: rewrite(f, META, b'{"tree": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "a leaf that is not there": lambda f: rewrite(f, META, b'{"tree": {"step": {"$tensor": "9"}}}'),
    "a header beyond memory": lambda f: rewrite(f, TENSORS, (2**62).to_bytes(8, "little") + b"{}"),
    "a header beyond all numbers": lambda f: rewrite(f, TENSORS, b"\xff" * 8 + b"{}"),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_checkpoint_is_passed_over_like_a_damaged_one(tmp_path, forge):
    checkpoints = Checkpoints(tmp_path / "checkpoints", holds=("step", "w"))
    for step in (1, 2):
        checkpoints.write(step, {"step": step, "w": torch.zeros(3)})
    forge(checkpoints.path(2))
    assert checkpoints.newest()[0] == 1


def test_checkpoints_that_were_deleted_are_missed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    checkpoints.write(1, "one")
    shutil.rmtree(checkpoints.root)
    with pytest.raises(CheckpointError, match="put them back"):
        checkpoints.newest()


def test_one_reads_while_another_writes(tmp_path, caplog):
    """Reading never fails, never removes what is being written, never goes back, and calls nothing damaged."""
    checkpoints, done = Checkpoints(tmp_path / "checkpoints"), threading.Event()
    checkpoints.write(0, {"step": 0})

    def write():
        for step in range(1, 200):
            checkpoints.write(step, {"step": step, "w": np.zeros(2_000)})
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not done.is_set():
        step, tree = checkpoints.newest()
        assert tree["step"] == step
        seen.append(step)
    thread.join()
    assert seen == sorted(seen) and checkpoints.steps() == [198, 199]
    assert not caplog.records


@pytest.mark.parametrize("listed", [[], [3]])
def test_a_list_that_is_out_of_date_is_read_again(tmp_path, monkeypatch, listed):
    """All that a reader listed was replaced by the time it looked: an empty list is no sign of an empty folder."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (7, 8):
        checkpoints.write(step, step)
    answers, steps = iter([listed]), checkpoints.steps
    monkeypatch.setattr(checkpoints, "steps", lambda: next(answers, steps()))
    assert checkpoints.newest() == (8, 8)


def test_only_the_newest_are_kept_and_a_step_can_be_rewritten(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3, 3):
        checkpoints.write(step, {"step": step})
    assert checkpoints.steps() == [2, 3] and checkpoints.newest() == (3, {"step": 3})
    single = Checkpoints(tmp_path / "one", keep=1)
    for step in (4, 5):
        single.write(step, step)
    assert single.steps() == [5]
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_leftovers_of_killed_writers_are_cleaned(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, "one")
    (tmp_path / ".000000000002.writing-99").mkdir()
    os.rename(checkpoints.path(1), tmp_path / ".000000000001.replaced-99")  # killed between the two renames
    with pytest.raises(CheckpointError, match="put them back"):  # who reads does not clean: a writer may be at work
        checkpoints.newest()
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.clean()
    assert checkpoints.newest() == (1, "one")
    assert [p.name for p in tmp_path.iterdir()] == ["000000000001"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A real limit on file size, in a child: the second, larger checkpoint cannot be written."""
    script = textwrap.dedent("""
        import resource, sys, numpy as np
        from embodied_rft.runs.tree_file import CheckpointError; from embodied_rft.runs.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.write(1, {"w": np.zeros(10)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.write(2, {"w": np.zeros(100_000)})
        except CheckpointError as error:
            print(error)
        else:
            sys.exit("no error")
        assert checkpoints.newest()[0] == 1
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not write checkpoint" in done.stdout and "Make room" in done.stdout and "untouched" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["000000000001"]


def test_a_killed_writer_loses_nothing(tmp_path):
    """kill -9 in the middle of endless writing: the newest whole checkpoint loads and is consistent."""
    script = textwrap.dedent("""
        import sys, numpy as np
        from embodied_rft.runs.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        for step in range(1, 10**9):
            checkpoints.write(step, {"step": step, "w": np.full(50_000, step)})
            print(step, flush=True)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        last = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    Checkpoints(tmp_path).clean()
    step, tree = Checkpoints(tmp_path).newest()
    assert step >= last and tree["step"] == step and (tree["w"] == step).all()
    assert not list(tmp_path.glob(".*"))


def test_no_pickle_on_disk(tmp_path):
    save(tmp_path / "c", sample_state())
    assert {p.name for p in (tmp_path / "c").iterdir()} == {TENSORS, META, MANIFEST}
    json.loads((tmp_path / "c" / META).read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert "pickle" not in Path(checkpoint.__file__).read_text().replace("without pickle", "")


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from embodied_rft.runs.lock import RunLock
        with RunLock(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {child.pid}"), RunLock(tmp_path):
        pass
    child.kill()  # the kernel frees the lock of a process that had no chance to
    child.wait()
    child.stdout.close()
    with RunLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    to_child, from_child = os.pipe(), os.pipe()
    lock = RunLock(tmp_path).__enter__()
    child = os.fork()
    if child == 0:  # outlives the lock's owner, as an orphaned worker would
        os.close(to_child[1])
        os.write(from_child[1], b"ready")
        os.read(to_child[0], 1)
        os._exit(0)
    try:
        os.read(from_child[0], 5)
        os.close(lock._descriptor)  # what the kernel does when the owner is killed
        _held_locks.clear()
        with RunLock(tmp_path):
            pass
    finally:
        os.close(to_child[1])
        os.waitpid(child, 0)
        for descriptor in (to_child[0], *from_child):
            os.close(descriptor)
