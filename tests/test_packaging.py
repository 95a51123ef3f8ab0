"""What is built holds everything and takes up one name only; the rooms have one module name each."""

import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest

from tests.lab import ROOT

ROOMS = ("envs", "agents", "configs")


def shipped_files():
    """Every file of the package and the three rooms that version control would keep."""
    ignored = ("__pycache__", ".pyc", ".egg-info")
    paths = (path for folder in ("embodied_rft", *ROOMS) for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(p.relative_to(ROOT).as_posix() for p in paths if not any(part in str(p) for part in ignored))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source archive, built from a copy so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    keep = ("embodied_rft", *ROOMS, "typings")
    for folder in keep:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_takes_one_name_and_has_every_file(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    packaged = [name for name in names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in packaged} == {"embodied_rft"}
    expected = [name if name.startswith("embodied_rft/") else f"embodied_rft/{name}" for name in shipped_files()]
    assert sorted(packaged) == sorted(expected)
    assert "Requires-Dist: mujoco==3.3.0" in metadata and "License-Expression: Apache-2.0" in metadata


def test_the_source_archive_has_every_file(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(shipped_files()) <= names and {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_works_away_from_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    script = textwrap.dedent(f"""
        import sys
        sys.path = [{str(tmp_path / "site")!r}] + [p for p in sys.path if p != {str(ROOT)!r}]
        import embodied_rft, embodied_rft.envs, embodied_rft.agents, embodied_rft.configs
        for module in (embodied_rft, embodied_rft.envs, embodied_rft.agents, embodied_rft.configs):
            assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
        from embodied_rft.runs.recipe import load_recipe
        assert load_recipe("demo").name == "demo"
        try:
            import envs
        except ImportError:
            print("one name only")
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "one name only\n", done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_bare_room_cannot_be_imported(room):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"import embodied_rft.{room}, not {room}" in done.stderr


def test_importing_the_package_is_light():
    """The name alone brings neither torch nor a simulator."""
    script = (
        "import embodied_rft, sys; print([m for m in ('torch', 'mujoco', 'gymnasium', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_constraints_pin_what_the_project_requires():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert pins["mujoco"] == "3.3.0" and pins["torch"] == "2.13.0" and pins["gymnasium-robotics"] == "1.4.2"
    assert int(pins["pyarrow"].split(".")[0]) < 26
    project = __import__("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("=")[0].strip().lower() for requirement in project["dependencies"]}
    assert names <= set(pins), names - set(pins)
