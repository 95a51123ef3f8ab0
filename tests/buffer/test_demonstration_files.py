"""Demonstration files: whatever was changed in one is noticed, values are looked at, and other formats are named."""

import gzip
import io
import json
import logging
import pickle
import zipfile

import numpy as np
import pytest
from gymnasium import spaces
from safetensors.numpy import load_file, save_file

from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.formats import recognise
from embodied_rft.buffer.trajectories import FORMAT, read_trajectories, within, write_trajectories
from embodied_rft.data import Field, Ragged, Trajectory
from embodied_rft.options import parse
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train

SPACE = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 90], np.float32))


def episode(length=5, seed=0, action=None, **observation):
    rng = np.random.default_rng(seed)
    observation = observation or {"state": rng.normal(size=(length + 1, 3)).astype(np.float32)}
    action = rng.uniform(SPACE.low, SPACE.high, (length, 2)).astype(np.float32) if action is None else action
    return Trajectory(observation, action, np.ones(length, np.float32), "truncated")


def rich(length, seed):
    """With everything that a file can hold: dense, ragged, text and images."""
    rng = np.random.default_rng(seed)
    images = [[rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)] for _ in range(length + 1)]
    tokens = Ragged.of([np.arange(rng.integers(1, 4)) for _ in range(length + 1)], np.int64)
    return episode(
        length,
        seed,
        state=np.ones((length + 1, 3), np.float32),
        camera=images,
        tokens=tokens,
        said=["hello"] * (length + 1),
    )


def rewrite(path, change):
    """The file with other arrays or another description, and no word about it."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()[FORMAT])
    arrays = load_file(path)
    change(arrays, description)
    save_file(arrays, path, metadata={FORMAT: json.dumps(description)})


def test_a_changed_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "demos.safetensors"
    write_trajectories(path, [rich(4, 0), rich(6, 1)])
    content, rng = path.read_bytes(), np.random.default_rng(0)
    assert len(read_trajectories(path)) == 2
    for position in rng.integers(0, len(content), 100):
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="demos"):
            read_trajectories(path)


def shift_lengths(arrays, description):
    description["lengths"][0] += 1
    description["lengths"][1] -= 1


def drop_row(arrays, description):
    arrays["action"] = arrays["action"][:-1]


def fewer_episodes(arrays, description):
    description["lengths"] = description["lengths"][:1]


def negative(arrays, description):
    description["lengths"] = [-2, *description["lengths"]]


def odd_offsets(arrays, description):
    arrays["observation/tokens#offsets"][1] = 99


def foreign_image(arrays, description):
    arrays["observation/camera"][0] = 999


def no_column(arrays, description):
    del description["columns"]["action"]


def no_mapping(arrays, description):
    description["episodes"] = [3, 4]


@pytest.mark.parametrize(
    "change", [shift_lengths, drop_row, fewer_episodes, negative, odd_offsets, foreign_image, no_column, no_mapping]
)
@pytest.mark.parametrize("old", [False, True])
def test_parts_that_contradict_each_other_are_refused(tmp_path, change, old):
    """With a checksum, and without one as older versions wrote, unless lengths alone still fit together."""
    path = tmp_path / "demos.safetensors"
    write_trajectories(path, [rich(4, 0), rich(6, 1)])
    rewrite(path, change)
    with pytest.raises(ValueError, match="checksum"):
        read_trajectories(path)
    if old and change is not shift_lengths:
        rewrite(path, lambda _, description: description.pop("sha256"))
        with pytest.raises(ValueError, match="contradict each other"):
            read_trajectories(path)


def test_files_of_older_versions_are_read_and_say_so(tmp_path, caplog):
    path = tmp_path / "demos.safetensors"
    write_trajectories(path, [episode()])
    rewrite(path, lambda _, description: description.pop("sha256"))
    with caplog.at_level(logging.WARNING):
        assert len(read_trajectories(path)) == 1
    assert "without a checksum" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["action", "reward", "observation/state"])
def test_nan_is_named_with_its_place(tmp_path, value, where):
    broken = episode()
    {"action": broken.action, "reward": broken.reward, "observation/state": broken.observation["state"]}[where][3] = (
        value
    )
    write_trajectories(tmp_path / "demos.safetensors", [episode(), broken])
    with pytest.raises(ValueError, match=f"episode 1 of .* holds NaN or infinity: '{where}' of decision 3"):
        read_trajectories(tmp_path / "demos.safetensors")


# --- actions outside the action space --------------------------------------------------------------------------------


def test_a_few_actions_outside_are_clipped_and_many_are_refused(tmp_path, caplog):
    few = episode(200)
    few.action[7] = 1e30, 90.0
    path = tmp_path / "demos.safetensors"
    write_trajectories(path, [few, episode(100, 1)])
    with caplog.at_level(logging.WARNING):
        loaded = read_trajectories(path, action_space=SPACE)
    assert "1 of 300 actions (0.33%) lie outside" in caplog.text
    assert loaded[0].action[7].tolist() == [1, 90] and loaded[0].action.dtype == np.float32
    assert np.array_equal(loaded[0].action[8:], few.action[8:])
    with pytest.raises(ValueError, match="1 of 300 actions .* other units"):
        read_trajectories(path, action_space=SPACE, outside=0.0)
    degrees = episode(50, action=np.full((50, 2), 57.3, np.float32))
    with pytest.raises(ValueError, match="50 of 50"):
        within([degrees], SPACE, outside=0.5, what="x")


def test_rounding_is_not_outside(caplog):
    edge = episode(10, action=np.tile(np.nextafter(SPACE.high, np.inf, dtype=np.float32), (10, 1)))
    assert (within([edge], SPACE, outside=0.0, what="x")[0].action <= SPACE.high).all()
    assert not caplog.text


@pytest.mark.parametrize(
    ("space", "good", "bad"),
    [
        (spaces.Discrete(3), 2, 3),
        (spaces.Discrete(3, start=1), 1, 0),
        (spaces.MultiDiscrete([3, 2]), [2, 1], [2, 2]),
        (spaces.MultiBinary(2), [0, 1], [0, 2]),
    ],
)
def test_choices_that_do_not_exist_are_never_clipped(space, good, bad):
    fine, wrong = (episode(4, action=np.array([value] * 4)) for value in (good, bad))
    assert np.array_equal(within([fine], space, outside=0.0, what="x")[0].action, fine.action)
    with pytest.raises(ValueError, match="lie outside"):
        within([fine] * 1000 + [wrong], space, outside=0.9, what="x")


def recipe(file, **options):
    tree = {
        "env": {"id": "Pendulum-v1", "num_envs": 2},
        "agent": {"id": "gaussian", "hidden": [8]},
        "buffer": {"capacity": 500},
        "stages": [{"load": {"file": str(file), **options}}, {"pretrain": {"objective": "bc", "updates": 1}}],
    }
    return parse(Recipe, tree)


def test_a_length_that_looks_like_a_pickle_is_a_length(tmp_path):
    """Headers of 640 bytes begin like a pickle of protocol 2, those of 123 like a JSON file."""
    for length in (640, 1_408, 123):
        header = b"{}".ljust(length)
        (tmp_path / "own").write_bytes(len(header).to_bytes(8, "little") + header)
        assert recognise(tmp_path / "own") is None


@pytest.mark.parametrize("scale", [1.0, 90.0])
def test_the_stage_counts_and_refuses(tmp_path, scale):
    rng = np.random.default_rng(0)
    action = (scale * rng.uniform(-2, 2, (40, 1))).astype(np.float32)
    one = episode(40, action=action, observation=rng.normal(size=(41, 3)).astype(np.float32))
    write_trajectories(tmp_path / "demos.safetensors", [one])
    if scale == 1:
        train(recipe(tmp_path / "demos.safetensors"), tmp_path / "run", quiet=True, report=False)
        return
    with pytest.raises(ValueError, match=r"of 40 actions .* lie outside of Box\(-2"):
        train(recipe(tmp_path / "demos.safetensors"), tmp_path / "run", quiet=True, report=False)
    loud = recipe(tmp_path / "demos.safetensors", outside=1.0)
    session = train(loud, tmp_path / "asked", quiet=True, report=False)
    assert np.abs(session.buffer.column("action/", session.buffer.rows())).max() <= 2


# --- other formats ---------------------------------------------------------------------------------------------------


def archive():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a", "b")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "HDF5 file"),
        (b"PAR1" + b"\0" * 90, "Parquet file"),
        (archive(), "zip archive"),
        (gzip.compress(b"x" * 90), "gzip archive"),
        (pickle.dumps({"a": 1}), "pickle, which is never loaded"),
        (b'{"episodes": []}', "JSON file"),
        (b"\x93NUMPY\x01\x00", "NumPy array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives hold the time
)
def test_a_file_of_another_format_says_what_it_is_and_what_reads_it(tmp_path, content, what):
    path = tmp_path / "demos.hdf5"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{what}.*write_trajectories"):
        read_trajectories(path)


@pytest.mark.parametrize(
    ("inside", "what"), [("meta/info.json", "LeRobot data set"), ("data/main_data.hdf5", "Minari"), (".zgroup", "Zarr")]
)
def test_folders_of_data_sets_are_named(tmp_path, inside, what):
    (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / inside).write_text("")
    with pytest.raises(ValueError, match=what):
        read_trajectories(tmp_path)


def test_our_own_files_are_no_foreign_format(tmp_path):
    write_trajectories(tmp_path / "demos.safetensors", [episode()])
    assert recognise(tmp_path / "demos.safetensors") is None
    schema = Schema({"state": Field((3,))}, Field((2,)))
    assert len(read_trajectories(tmp_path / "demos.safetensors", schema=schema, action_space=SPACE)) == 1
