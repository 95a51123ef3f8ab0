"""What a run folder promises: readers change nothing, files are kept, runs can grow, the best policy stays."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from embodied_rft import cli
from embodied_rft.buffer.memory import available_memory
from embodied_rft.options import ConfigError, parse
from embodied_rft.report.page import write_report
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.inputs import keep_plugins
from embodied_rft.runs.judge import evaluate_run
from embodied_rft.runs.lock import RunLock
from embodied_rft.runs.recipe import Recipe, load_recipe
from embodied_rft.runs.session import Interrupted, Session
from embodied_rft.runs.trained import opened
from embodied_rft.runs.tree_file import CheckpointError
from embodied_rft.train import train
from tests.lab import ROOT
from tests.runs.test_resume import metrics_of, same

TREE = {
    "name": "short",
    "env": {"id": "embodied_rft/FetchReach-v0", "num_envs": 4, "options": {"num_threads": 1}},
    "agent": {"id": "gaussian", "hidden": [16]},
    "buffer": {"capacity": 3_000},
    "threads": 1,
    "stages": [
        {"demonstrate": {"episodes": 4, "noise": 0.3}},
        {"pretrain": {"objective": "bc", "updates": 40, "log_every": 20, "evaluate_every": 20, "evaluate_episodes": 4}},
        {"finetune": {"objective": "sac", "decisions": 400, "decisions_per_iteration": 100, "evaluate_every": 200,
                      "evaluate_episodes": 4}},
        {"evaluate": {"episodes": 4, "name": "final"}},
    ],
}  # fmt: skip


def short(**changes):
    return parse(Recipe, TREE | changes)


def with_stages(change):
    """The recipe after `change(stages)`."""
    tree = json.loads(json.dumps(TREE))
    change(tree["stages"])
    return parse(Recipe, tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(short(), folder, quiet=True)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_leaves_nothing_that_has_no_name(finished):
    known = {path.name for path in vars(RunFolder(finished)).values()} | {".checkpoints-began"}
    left = {path.name for path in finished.iterdir()}
    assert left <= known and {"recipe.yaml", "metrics.jsonl", "evaluations", "checkpoints"} <= left


def newest(folder):
    return Checkpoints(folder / "checkpoints").newest()[1]


def stop_after(monkeypatch, saves):
    """The run is asked to stop when that many checkpoints are written."""
    count, tick = [0], Session.tick

    def stopping(self):
        count[0] += 1
        self.stopping = count[0] >= saves
        tick(self)

    monkeypatch.setattr(Session, "tick", stopping)


# --- readers ---


def content(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_evaluating_changes_nothing_but_its_own_evaluation(run):
    leftover = run / "checkpoints" / ".000000000099.writing-1"
    leftover.mkdir()  # what the trainer is writing just now
    before = content(run)
    with RunLock(run):  # as a training holds it
        evaluate_run(run, episodes=4)
        write_report(run)
    after = content(run)
    assert leftover.is_dir() and before.keys() <= after.keys()
    changed = {p.relative_to(run).as_posix() for p in after if before.get(p) != after[p]}
    assert changed == {"evaluations/later-again-0-4.json", "report.html", "summary.json", ".lock"}


def test_a_policy_is_measured_in_the_environment_that_it_was_trained_in(run, tmp_path, monkeypatch):
    from embodied_rft.runs import judge

    asked = []
    monkeypatch.setattr(judge, "open_pool", lambda env, **options: asked.append(env) or open_pool(env, **options))
    from embodied_rft.pools.pool import open_pool

    evaluate_run(run, episodes=4)
    assert (asked[0].options, asked[0].pool, asked[0].num_envs) == ({"num_threads": 1}, "auto", 4)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("num_threads: 1", "num_threads: 2"))
    with pytest.raises(ValueError, match=r"not the recipe that was trained .*num_threads: 1.*num_threads: 2"):
        evaluate_run(run, episodes=4)
    (run / "recipe.yaml").unlink()  # the checkpoint holds it, too
    assert evaluate_run(run, episodes=4).episodes == 4


def test_the_pool_of_the_recipe_is_used(tmp_path):
    recipe = short(env=TREE["env"] | {"pool": "workers", "num_workers": 2}, stages=[{"evaluate": {"episodes": 4}}])
    train(recipe, tmp_path / "run", quiet=True, report=False)
    with opened(tmp_path / "run") as session:
        assert (session.env.pool, session.env.num_workers, session.env.num_envs) == ("workers", 2, 4)
    assert evaluate_run(tmp_path / "run", episodes=2).episodes == 2  # fewer than workers


# --- damage ---


@pytest.mark.parametrize("name", ["run.json", "run.log", "stages.json", "metrics.jsonl", "metrics.csv", "recipe.yaml"])
@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"[3]", b'{"a": 1}\n'])
def test_what_is_only_for_people_stops_neither_training_nor_report(run, name, damage):
    (run / name).write_bytes(damage)
    evaluations = sorted((run / "evaluations").glob("*.json"))
    evaluations[0].write_bytes(damage)
    write_report(run)
    page = (run / "report.html").read_text()
    assert "Damaged files" in page and evaluations[0].name in page and "Success" in page
    train(short(), run, quiet=True)
    assert newest(run)["finished"] and load_recipe(run / "recipe.yaml").seed == 0
    assert len(json.loads((run / "stages.json").read_text())) == 4


def test_deleted_checkpoints_are_missed(run):
    before = metrics_of(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="put them back"):
        train(short(), run, quiet=True)
    assert metrics_of(run) == before


@pytest.mark.parametrize("name", [".lock", "run.log", "metrics.jsonl", "metrics.csv", "evaluations/2-0.json"])
def test_a_file_that_leads_elsewhere_is_refused(run, tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_text("a thesis")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious)
    with pytest.raises(ValueError, match=rf"{Path(name).name} is a symbolic link"):
        train(with_stages(lambda stages: stages.append({"evaluate": {"episodes": 4}})), run, quiet=True)
    assert precious.read_text() == "a thesis"


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../x", "", ".", "a\nb"])
def test_a_recipe_cannot_name_a_folder_outside(name):
    with pytest.raises(ConfigError, match="name must name a folder inside"):
        short(name=name)


@pytest.mark.parametrize("data", ["word", [1, 2], 3, None])
@pytest.mark.parametrize("part", ["env", "agent", "stages", "buffer", "logging", "plugins"])
def test_parts_of_another_kind_are_sentences(tmp_path, capsys, part, data):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TREE | {part: data}))
    try:
        load_recipe(tmp_path / "r.yaml")
    except ConfigError as error:
        assert part in str(error)


# --- longer ---


def test_a_stopped_run_made_longer_is_the_longer_run(tmp_path, monkeypatch):
    longer = with_stages(lambda stages: stages[2]["finetune"].update(decisions=800))
    train(longer, tmp_path / "whole", quiet=True, report=False)
    with monkeypatch.context() as patch:
        stop_after(patch, saves=4)
        with pytest.raises(Interrupted):
            train(short(), tmp_path / "run", quiet=True, report=False)
    train(longer, tmp_path / "run", quiet=True, report=False)
    same(newest(tmp_path / "run"), newest(tmp_path / "whole"))


def test_a_finished_run_goes_on_with_its_optimisers_and_is_measured_again(run, monkeypatch):
    before, seen = newest(run), {}
    longer = with_stages(lambda stages: stages[2]["finetune"].update(decisions=800))
    make = Session.make_learner

    def watched(self, config):
        seen["resumed"] = self._resume is not None
        learner = make(self, config)
        seen["learner"] = learner.state_dict()
        return learner

    monkeypatch.setattr(Session, "make_learner", watched)
    train(longer, run, quiet=True)
    after = newest(run)
    assert seen["resumed"] and seen["learner"].keys() == before["tail"]["learner"].keys()
    same(before["tail"]["learner"]["updates"], before["tail"]["learner"]["updates"])
    assert after["counters"]["decisions"] == before["counters"]["decisions"] + 400
    assert [record["word"] for record in after["records"]] == ["demonstrate", "pretrain", "finetune", "evaluate"]
    assert after["records"][2]["decisions"] == 800
    assert yaml.safe_load((run / "recipe.yaml").read_text())["stages"][2]["finetune"]["decisions"] == 800
    assert evaluate_run(run, episodes=4).episodes == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.append({"finetune": {"objective": "sac", "decisions": 100}}), 5),
        (lambda s: s[3]["evaluate"].update(episodes=6), 4),
        (lambda s: s.insert(3, {"evaluate": {"episodes": 2}}), 5),
        (lambda s: s[2]["finetune"].update(evaluate_every=100, decisions=500), 4),
    ],
    ids=["another stage", "more states", "a stage before the measurement", "a denser curve"],
)
def test_what_is_still_to_come_may_be_changed(run, change, words):
    train(with_stages(change), run, quiet=True)
    state = newest(run)
    assert len(state["records"]) == words and state["finished"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s[2]["finetune"].update(decisions=200), "decisions: 200"),
        (lambda s: s[2]["finetune"].update(objective={"id": "sac", "batch_size": 64}), "batch_size: 64"),
        (lambda s: s[1]["pretrain"].update(updates=80), "updates: 80"),
        (lambda s: s[0]["demonstrate"].update(episodes=8), "episodes: 8"),
        (lambda s: s.pop(0), "demonstrate"),
        (lambda s: s.pop(2), "finetune"),
    ],
)
def test_what_was_run_cannot_be_changed(run, change, named):
    before = newest(run)
    with pytest.raises(ValueError, match=rf"another recipe .*{named}"):
        train(with_stages(change), run, quiet=True)
    same(newest(run), before)


def test_seed_agent_and_environment_belong_to_the_run(run):
    for change, named in (
        ({"seed": 5}, "seed: 5"),
        ({"agent": {"id": "gaussian", "hidden": [8]}}, r"- 8"),
        ({"env": TREE["env"] | {"num_envs": 2}}, "num_envs: 2"),
    ):
        with pytest.raises(ValueError, match=rf"another recipe .*{named}"):
            train(short(**change), run, quiet=True)
    train(short(logging={"csv": False}, checkpoint_seconds=1.0, description="other words"), run, quiet=True)


# --- best ---


def test_the_best_policy_of_the_curve_is_kept(run):
    curve = [json.loads(p.read_text()) for p in (run / "evaluations").glob("*.json")]
    curve = sorted((e for e in curve if e["sheet"] == 1), key=lambda e: e["wall_seconds"])
    assert len(curve) == 4
    best = max(curve, key=lambda e: e["success"])
    state = newest(run)
    assert state["best"]["value"] == best["success"] and state["best"]["decisions"] == best["decisions"]
    with opened(run, "best") as session:
        assert session.counters["decisions"] == best["decisions"] and list(session.path) == best["stage"]
    outcome = evaluate_run(run, episodes=4, sheet=1, checkpoint="best")
    assert (outcome.success, outcome.returns) == (best["success"], best["returns"])


def test_without_a_curve_there_is_no_best(tmp_path):
    train(short(stages=TREE["stages"][:1]), tmp_path / "run", quiet=True, report=False)
    with pytest.raises(ValueError, match="evaluate_every"):
        evaluate_run(tmp_path / "run", checkpoint="best")


# --- files ---


def write_problems(path, word="{a}+{b}="):
    lines = [json.dumps({"prompt": word.format(a=a, b=b), "answer": str(a + b)}) for a in range(6) for b in range(6)]
    path.write_text("\n".join(lines))


PROJECT = {
    "plugins": ["kept_corridor"],
    "env": {"id": "embodied_rft/TextJsonl-v0", "num_envs": 4, "options": {"path": "data/sums.jsonl"}},
    "agent": {"id": "language", "model": {"tiny": {"hidden_size": 32}}, "max_new_tokens": 2, "prompt": "plain"},
    "stages": [{"evaluate": {"episodes": 4, "name": "before"}}],
}


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    write_problems(folder / "data" / "sums.jsonl")
    (folder / "kept_corridor.py").write_text("import kept_helper\n")
    (folder / "kept_helper.py").write_text("WORD = 1\n")
    (folder / "mine.yaml").write_text(yaml.safe_dump(PROJECT))
    return folder


def erft(*arguments, cwd, **env):
    root = ROOT
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | env
    command = [sys.executable, "-m", "embodied_rft.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_run_folder_is_whole_wherever_it_lies(project, tmp_path):
    """Trained from elsewhere, the project deleted, the folder moved: it is evaluated all the same."""
    done = erft("train", "project/mine.yaml", "--run", "run", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    write_problems(project / "data" / "sums.jsonl", "Which letter comes after {a}{b}?")
    done = erft("train", "project/mine.yaml", "--run", "run", "--quiet", cwd=tmp_path)
    assert done.returncode == 2 and "another recipe" in done.stderr and "path: inputs/sums-" in done.stderr, done.stderr
    shutil.rmtree(project)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    done = erft("eval", tmp_path / "moved", "--episodes", 4, "--trust", cwd="/")
    assert done.returncode == 0, done.stderr
    kept = {p.name for p in (tmp_path / "moved" / "inputs" / "plugins").iterdir()}
    assert kept == {"kept_corridor.py", "kept_helper.py"}
    done = erft("train", "moved/recipe.yaml", "--run", "moved", "--quiet", cwd=tmp_path)  # its own recipe continues it
    assert done.returncode == 0, done.stderr


def test_only_foreign_modules_are_kept(tmp_path):
    """The engine itself and what is installed are no plug-ins, however a recipe names them."""
    recipe = parse(Recipe, TREE | {"plugins": ["numpy"], "env": {"id": "embodied_rft.envs:embodied_rft/FetchReach-v0"}})
    assert keep_plugins(recipe, RunFolder(tmp_path)) == [] and list(tmp_path.iterdir()) == []


def test_a_changed_plugin_is_said(project, tmp_path):
    assert erft("train", project / "mine.yaml", "--run", "run", "--quiet", cwd=tmp_path).returncode == 0
    (project / "kept_helper.py").write_text("WORD = 2\n")
    assert erft("train", project / "mine.yaml", "--run", "run", "--quiet", cwd=tmp_path).returncode == 0
    assert "plug-ins have changed since this run began: kept_helper.py" in (tmp_path / "run" / "run.log").read_text()


def test_an_environment_that_changes_the_folder_does_not_split_the_run(tmp_path):
    (tmp_path / "wanders.py").write_text(
        textwrap.dedent("""
        import os, gymnasium, numpy as np
        class Wanders(gymnasium.Env):
            observation_space = gymnasium.spaces.Box(-1, 1, (2,))
            action_space = gymnasium.spaces.Box(-1, 1, (1,))
            def __init__(self): os.makedirs("elsewhere", exist_ok=True); os.chdir("elsewhere")
            def reset(self, *, seed=None, options=None): return np.full(2, (seed or 0) % 7 / 7, np.float32), {}
            def step(self, action): return np.zeros(2, np.float32), 0.0, True, False, {}
        gymnasium.register("Wanders-v0", Wanders)
        """)
    )
    recipe = {"plugins": ["wanders"], "env": {"id": "Wanders-v0", "num_envs": 1}, "agent": {"id": "gaussian"},
              "stages": [{"evaluate": {"episodes": 2}}]}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = erft("train", "r.yaml", "--run", "run", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"report.html", "checkpoints", "stages.json", "run.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert not [path for path in tmp_path.rglob("elsewhere/*") if path.is_file()]


# --- machine ---


def test_threads_of_the_run_are_kept(tmp_path):
    recipe = short(threads=None, stages=TREE["stages"][:2])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        train(recipe, tmp_path / "run", quiet=True, report=False)
        torch.set_num_threads(2)
        longer = short(threads=None)
        session = train(longer, tmp_path / "run", quiet=True, report=False)
        assert session.threads == torch.get_num_threads() == 1
        assert "used 1 threads, not 2: going on with 1" in (tmp_path / "run" / "run.log").read_text()
    finally:
        torch.set_num_threads(before)


def group(root, path, **files):
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def test_the_smallest_limit_of_memory_holds(tmp_path):
    """Control groups of both versions, nested: outer limits count as well."""
    (tmp_path / "proc/self").mkdir(parents=True)
    machine = available_memory(tmp_path)
    assert machine > 10**6
    two = {"memory__current": 500, "memory__stat": "anon 1\ninactive_file 100"}
    (tmp_path / "proc/self/cgroup").write_text("0::/slice/job/step\n")
    group(tmp_path, "slice/job/step", memory__max="max", memory__high="max", **two)
    group(tmp_path, "slice/job", memory__max=5_000, memory__high="max", **two)
    group(tmp_path, "slice", memory__max=100_000, memory__high="max", **two)
    assert available_memory(tmp_path) == 5_000 - 500 + 100
    group(tmp_path, "slice/job/step", memory__high=3_000)
    assert available_memory(tmp_path) == 3_000 - 500 + 100
    one = {"memory__usage_in_bytes": 50, "memory__stat": "total_inactive_file 7"}
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/x\n4:cpuset,memory:/docker/abc\n0::/\n")
    group(tmp_path, "memory/docker/abc", memory__limit_in_bytes=2**63 - 4096, **one)
    group(tmp_path, "memory/docker", memory__limit_in_bytes=1_000, **one)
    assert available_memory(tmp_path) == 957
    shutil.rmtree(tmp_path / "sys/fs/cgroup/memory/docker")  # inside a container only its own group is seen
    group(tmp_path, "memory", memory__limit_in_bytes=2_000, **one)
    assert available_memory(tmp_path) == 1_957


def test_ulimit_is_a_limit():
    script = (
        "import resource, psutil; from embodied_rft.buffer.memory import available_memory\n"
        "limit = psutil.Process().memory_info().vms + 10**8\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "print(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 0 < int(done.stdout) <= 10**8, done.stderr


def test_eval_takes_best_on_the_command_line(run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(run), "--episodes", "4", "--best"])
    assert not ended.value.code and "held-out" in capsys.readouterr().out
    assert json.loads((run / "evaluations" / "later-again-best-0-4.json").read_text())["name"].startswith("best")
    assert np.isfinite(json.loads((run / "summary.json").read_text())["after"]["mean_return"])
