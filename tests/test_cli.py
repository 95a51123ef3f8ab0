"""The command: verbs, messages and exit codes. What the verbs do is tested where it is done."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from embodied_rft import cli, doctor, registry
from embodied_rft.data import Finding
from embodied_rft.runs.tree_file import CheckpointError


def run(*arguments):
    """(exit code of the command run in this process)."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def session(monkeypatch):
    """A session module whose `train` does what a test says."""
    calls = []
    fake = types.ModuleType("embodied_rft.train")

    def train(recipe, folder, *, quiet, report):
        calls.append((recipe, folder, quiet, report))
        if fake.error is not None:
            raise fake.error
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(f"name: {recipe.name}\nseed: {recipe.seed}\n")

    fake.train, fake.error, fake.calls = train, None, calls
    monkeypatch.setitem(sys.modules, "embodied_rft.train", fake)
    return fake


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("env: {id: some/Env-v0}\nagent: {id: gaussian}\nstages: []\n")
    return path


def test_help_lists_the_verbs_without_importing_anything_heavy():
    script = (
        "import sys; sys.argv = ['erft', '--help']\nfrom embodied_rft.cli import main\n"
        "try: main()\nexcept SystemExit as e: print('code', e.code, 'torch' in sys.modules, 'mujoco' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert all(verb in done.stdout for verb in cli.VERBS) and done.stdout.endswith("code 0 False False\n")


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_explains_itself(verb, capsys):
    assert run(verb, "--help") == 0
    assert f"erft {verb}" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert run() == 0
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian", "demo"], "unknown verb 'trian'; did you mean 'train'?"),
        (["list", "agent"], "unknown kind; did you mean 'agents'?"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["train", "dmeo"], "no shipped recipe 'dmeo'; did you mean 'demo'?"),
        (["train", "mine.yaml", "env.num_env=3"], "unknown key env.num_env; did you mean 'num_envs'?"),
        (["train", "mine.yaml", "--seed", "-4"], "seed must be in [0, 2**31); got -4"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(recipe, session, capsys, arguments, message):
    assert run(*arguments) == 2
    written = capsys.readouterr()
    assert message in written.err and written.err.startswith("erft: ") and "Traceback" not in written.err
    assert session.calls == []


def test_wrong_options_are_refused(capsys):
    assert run("train", "demo", "--sed", "3") == 2
    assert "--seed" in "".join(capsys.readouterr())


def test_train_passes_everything_on_and_names_the_report(recipe, session, tmp_path, capsys):
    assert (
        run("train", "mine.yaml", "env.num_envs=3", "--seed", "5", "--run", "there", "agent.hidden=[8]", "--quiet") == 0
    )
    ((loaded, folder, quiet, report),) = session.calls
    assert (loaded.env.num_envs, loaded.seed, loaded.agent["hidden"]) == (3, 5, [8])
    assert (folder, quiet, report) == (tmp_path / "there", True, False)
    assert capsys.readouterr().out == "report: there/report.html\n"
    assert (tmp_path / "there" / "report.html").is_file()
    facts = json.loads((tmp_path / "there" / "run.json").read_text())
    assert (
        facts["command"] == "erft train mine.yaml env.num_envs=3 'agent.hidden=[8]' seed=5 --run there"
        and facts["versions"]["torch"]
    )


def test_the_default_folder_follows_name_and_seed(recipe, session):
    run("train", "mine.yaml")
    run("train", "mine.yaml", "--seed", "2")
    assert [call[1].relative_to(Path.cwd()).as_posix() for call in session.calls] == [
        "runs/mine",
        "runs/mine-seed2",
    ]


@pytest.mark.parametrize(
    "error", [ValueError("no such thing"), CheckpointError("disk full"), FileNotFoundError("demos.npz")]
)
def test_errors_of_the_user_have_no_traceback(recipe, session, capsys, error):
    session.error = error
    assert run("train", "mine.yaml") == 2
    assert capsys.readouterr().err == f"erft: {error}\n"
    with pytest.raises(type(error)):
        cli.main(["train", "mine.yaml", "--debug"])


def test_our_own_errors_show_where_they_are(recipe, session):
    session.error = AssertionError("a broken invariant")
    with pytest.raises(AssertionError):
        cli.main(["train", "mine.yaml"])


def outcome(tmp_path, *, plant="", plugin=""):
    """`erft list stages` in a process, after a plug-in was imported in which `plant` ran: what it prints, its code."""
    (tmp_path / "mine.py").write_text(plugin)
    script = f"import sys, mine; from embodied_rft import cli, registry\n{plant}\ncli.main(['list', 'stages'])"
    return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)


def test_a_shape_error_in_our_code_is_a_bug_of_ours(tmp_path):
    """NumPy raises ValueError too: in our file it is no mistake of the user, in a plug-in's it is as it was raised."""
    misuse = "import numpy as np\ndef broken(*a):\n    np.zeros(2) + np.zeros(3)\n"
    ours = Path(cli.__file__).with_name("registry.py")
    done = outcome(tmp_path, plant=f"exec(compile({misuse!r}, {str(ours)!r}, 'exec')); registry.known = broken")
    assert done.returncode == cli.BROKEN
    assert "Traceback" in done.stderr and "could not be broadcast" in done.stderr and cli.BUG in done.stderr
    done = outcome(tmp_path, plant="registry.known = mine.broken", plugin=misuse)
    assert done.returncode == cli.USER
    assert "could not be broadcast" in done.stderr and "Traceback" not in done.stderr
    done = outcome(tmp_path, plant="registry.known = mine.broken", plugin=misuse.replace("np.zeros(2) +", "{}[1],"))
    assert done.returncode == cli.BROKEN and "KeyError" in done.stderr and cli.BUG not in done.stderr


def test_eval_prints_the_rate_and_renews_the_report(recipe, session, monkeypatch, capsys):
    fake = types.ModuleType("embodied_rft.runs.judge")
    asked = {}
    fake.evaluate_run = lambda run, **options: asked.update(options) or "success 0.950"
    monkeypatch.setitem(sys.modules, "embodied_rft.runs.judge", fake)
    run("train", "mine.yaml", "--run", "r")
    assert run("eval", "r", "--episodes", "7", "--official") == 0
    assert asked == {
        "episodes": 7,
        "sheet": 0,
        "env": None,
        "official": True,
        "checkpoint": "newest",
        "device": "auto",
        "trust": False,
    }
    assert capsys.readouterr().out.splitlines()[-2:] == ["success 0.950", "report: r/report.html"]


def test_an_interrupt_says_how_to_continue(recipe, session, capsys):
    session.error = KeyboardInterrupt("stopped after a checkpoint")
    assert run("train", "mine.yaml", "--run", "a b") == 130
    assert capsys.readouterr().err == (
        "erft: stopped after a checkpoint\ncontinue with the same command: erft train mine.yaml --run 'a b'\n"
    )


def test_report_is_written_anew(recipe, session, tmp_path, capsys):
    run("train", "mine.yaml", "--run", "r")
    (tmp_path / "r" / "report.html").unlink()
    assert run("report", "r") == 0 and (tmp_path / "r" / "report.html").is_file()


@pytest.mark.parametrize("kind", cli.LISTED)
def test_everything_known_is_listed_with_a_line(kind, capsys, monkeypatch):
    ours = {k: {id: registry.find(k, id) for id in registry.shipped(k)} for k in registry._tables}
    monkeypatch.setattr(registry, "_tables", ours)  # other tests register plug-ins of their own
    assert run("list", kind) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        id, _, text = line.strip().partition(" ")
        assert len(text.strip()) > 10, f"{id} says nothing about itself"


def test_doctor_checks_this_machine(capsys):
    code = run("doctor")
    out = capsys.readouterr().out
    assert code == 0, out
    assert "3.3.0" in out and "10 steps of FetchReach" in out


def test_doctor_reports_what_is_broken(monkeypatch, capsys):
    """By its own checks, by those of our environments, and by one that a plug-in registers."""

    def check_engine():
        raise ImportError("no module named engine")

    monkeypatch.setitem(registry._tables, "check", {"MuJoCo": registry.find("check", "MuJoCo")})
    monkeypatch.setattr("mujoco.__version__", "3.17.0")
    registry.register("check", "Engine")(check_engine)
    findings = doctor.examine()
    assert findings["Engine"] == Finding("ImportError: no module named engine", "broken")
    assert findings["MuJoCo"].state == "broken" and "mujoco==3.3.0" in findings["MuJoCo"].advice
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert "Engine" in out and "broken" in out


def test_doctor_tells_which_worlds_can_be_opened(monkeypatch):
    from embodied_rft.envs.worlds import checks

    real = checks.version_of
    monkeypatch.setattr(checks, "version_of", lambda package: real("numpy"))
    found = checks.check_worlds()
    assert found.state == "ok" and found.value.count(real("numpy")) == len(checks.PACKAGES) and real("no-such") is None
    monkeypatch.setattr(checks, "version_of", lambda package: None if package == "crafter" else "1.0")
    found = checks.check_worlds()
    assert (
        found.state == "note" and "crafter" not in found.value and "for Crafter-v0: pip install crafter" in found.advice
    )


def test_a_loss_that_explodes_stops_the_run_and_leaves_a_whole_checkpoint(tmp_path, monkeypatch, capsys):
    from embodied_rft.runs.tree_file import load

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "extends: text/grpo\nstages:\n  - demonstrate: {episodes: 40}\n"
        "  - pretrain: {objective: {id: bc, batch_size: 32}, updates: 20, learner: {learning_rate: 1.0e+30}}\n"
    )
    assert run("train", "mine.yaml", "--run", "run") == cli.USER
    said = capsys.readouterr().err
    assert "loss 'policy' of update" in said and "is nan" in said and "no weight" in said and "Traceback" not in said
    assert load(max((tmp_path / "run" / "checkpoints").iterdir()))
