"""Nothing that comes from others runs unless the user says so: run folders, models, zips."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from embodied_rft.agents.models.pretrained import load_pretrained
from embodied_rft.options import ConfigError, parse
from embodied_rft.runs.judge import evaluate_run
from embodied_rft.runs.recipe import Recipe, recipe_of
from embodied_rft.runs.trust import foreign_code, is_installed
from embodied_rft.train import train
from tests.lab import ROOT

PLUGIN = """
import os
from pathlib import Path
Path(os.environ["MARKER"]).write_text("ran")
"""
RECIPE = {
    "plugins": ["foreign_plugin"],
    "env": {"id": "Pendulum-v1", "num_envs": 1},
    "agent": {"id": "gaussian", "hidden": [8]},
    "buffer": {"capacity": 500},
    "stages": [{"warm_up": {"decisions": 5}}],
}


def erft(*arguments, cwd, marker):
    root = ROOT
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MARKER": str(marker)}
    command = [sys.executable, "-c", "from embodied_rft.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_foreign_run_folder_runs_nothing_without_the_users_word(tmp_path):
    made, marker = tmp_path / "made", tmp_path / "marker"
    made.mkdir()
    (made / "foreign_plugin.py").write_text(PLUGIN)
    (made / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    assert erft("train", "mine.yaml", "--run", "run", "--quiet", cwd=made, marker=marker).returncode == 0
    assert marker.exists(), "the trial would see nothing"
    marker.unlink()
    sent = tmp_path / "sent"
    shutil.move(made / "run", sent)
    (sent / "foreign_plugin.py").write_text(PLUGIN)  # also beside the recipe, where `erft eval .` stands
    done = erft("eval", ".", "--episodes", 1, cwd=sent, marker=marker)
    assert done.returncode == 2 and "plugins: foreign_plugin" in done.stderr and "--trust" in done.stderr
    assert not marker.exists()
    done = erft("eval", ".", "--episodes", 1, "--trust", cwd=sent, marker=marker)
    assert done.returncode == 0 and marker.exists(), done.stderr
    assert "trusted: code that comes with the run" in done.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plugins": ["mine"]}, "plugins: mine"),
        ({"plugins": ["torch", "mine.part"]}, "plugins: mine.part"),
        ({"env": {"id": "mine:Reach-v0"}}, "env.id: mine:Reach-v0"),
        ({"env": {"id": "Pendulum-v1", "wrappers": [{"id": "subprocess:Popen", "args": "ls"}]}}, "env.wrappers.0.id"),
        ({"agent": {"id": "lerobot", "path": "x", "policy": "os.path:join"}}, "agent.policy: os.path:join"),
        ({"agent": {"id": "sb3", "path": "x", "trust": True}}, "agent.trust: True"),
        ({"agent": {"id": "residual", "base": {"id": "sb3", "path": "x", "trust": True}}}, "agent.base.trust"),
        ({"stages": [{"adapt": {"with": "residual", "options": {"trust": 1}}}]}, "stages.0.adapt.options.trust"),
    ],
)
def test_everything_that_would_run_is_found(tmp_path, change, named):
    tree = {**RECIPE, "plugins": [], **change}
    assert named in "; ".join(foreign_code(tree))
    with pytest.raises(ConfigError, match=r"runs code that is not installed here: .*--trust"):
        recipe_of(yaml.safe_dump(tree), tmp_path)


def test_what_is_installed_needs_a_word_all_the_same_where_it_is_called():
    agent = {"id": "lerobot", "path": "x", "policy": "torch.hub:load"}
    assert foreign_code({**RECIPE, "plugins": [], "agent": agent}) == ["agent.policy: torch.hub:load"]


def test_what_is_installed_or_no_code_needs_no_word(tmp_path):
    tree = {
        **RECIPE,
        "plugins": ["gymnasium_robotics"],
        "env": {"id": "gymnasium:Pendulum-v1", "wrappers": [{"id": "TimeLimit", "max_episode_steps": 20}]},
        "agent": {"id": "sb3", "path": "/x/y:z.zip", "trust": False},
        "description": "12:30, or cuda:0",
    }
    assert foreign_code(tree) == []
    assert is_installed("torch") and is_installed("embodied_rft.agents")
    assert not any(map(is_installed, ("tests", "nothing_of_this_name", "antigravity", "")))


def test_a_folder_that_is_not_trusted_is_no_place_to_import_from(tmp_path):
    """Else a file named after a package that is missing here would run when somebody asks for that package."""
    recipe = {**RECIPE, "plugins": []}
    train(parse(Recipe, recipe), tmp_path / "run", quiet=True, report=False)
    (tmp_path / "run" / "inputs" / "plugins").mkdir(parents=True)
    evaluate_run(tmp_path / "run", episodes=1)
    assert not any(str(tmp_path) in place for place in sys.path)


@pytest.mark.parametrize("files", ["config.json", "tokenizer_config.json"])
def test_a_model_folder_with_code_of_its_own_neither_runs_nor_asks(tmp_path, monkeypatch, files):
    marker = tmp_path / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\nclass Mystery: pass\n"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mystery.py").write_text(code)
    classes = {"AutoConfig": "mystery.Mystery", "AutoModelForCausalLM": "mystery.Mystery"}
    config = {"model_type": "mystery", "auto_map": classes} if files == "config.json" else {"model_type": "llama"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Mystery", "auto_map": {"AutoTokenizer": ["mystery.Mystery", None]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pretrained(str(tmp_path / "model"), ["AutoModelForCausalLM"], what="language model", dtype="fp32")
    assert not marker.exists()


def test_the_log_of_a_run_says_what_was_trusted(tmp_path):
    import gymnasium
    from stable_baselines3 import SAC

    model = SAC(
        "MlpPolicy", gymnasium.make("Pendulum-v1"), device="cpu", buffer_size=10, policy_kwargs={"net_arch": [8]}
    )
    model.save(tmp_path / "model.zip")
    for trust in (False, True):
        recipe = {
            **RECIPE,
            "plugins": [],
            "agent": {"id": "sb3", "path": str(tmp_path / "model.zip"), "trust": trust},
            "stages": [{"evaluate": {"episodes": 1}}],
        }
        train(parse(Recipe, recipe), tmp_path / f"run-{trust}", quiet=True, report=False)
        said = (tmp_path / f"run-{trust}" / "run.log").read_text()
        assert ("unpickles" in said) == trust
    with pytest.raises(ValueError, match="--trust"):
        evaluate_run(tmp_path / "run-True", episodes=1)
    assert evaluate_run(tmp_path / "run-True", episodes=1, trust=True).episodes == 1
