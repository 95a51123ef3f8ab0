"""No option without effect, of stages, learner, buffer, environments, logs, recipe: each set in a whole little run."""

import contextlib
import functools
import io
import json
import sys
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass

from embodied_rft import registry
from embodied_rft.buffer.trajectories import write_trajectories
from embodied_rft.data import Source, Trajectory
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.names import UserError
from embodied_rft.options import STRICT, parse
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.incidents import EnvironmentFailure
from embodied_rft.runs.log import LogConfig
from embodied_rft.runs.recipe import BufferConfig, Recipe
from embodied_rft.stages.collect import Collect
from embodied_rft.train import train
from tests.lab import helpers_zoo  # noqa: F401  registers Zoo-v0
from tests.lab.effects import Walk, Work, tally
from tests.lab.helpers_envs import Moody

sys.path.append(str(Path(__file__).parent / "lab" / "plugins"))  # walked_plugin


class Telling(Moody):
    """Tells how far it is from the origin where an episode ends."""

    def step(self, action):
        seen, reward, over, cut, info = super().step(action)
        return seen, reward, over, cut, {**info, "way/left": -reward}


gymnasium.register("Telling-v0", Telling, max_episode_steps=50)
gymnasium.register("Brisk-v0", lambda **options: Moody(stride=0.6, **options), max_episode_steps=50)

MOODY = {"id": "Moody-v0", "num_envs": 2}
SMALL = {"id": "gaussian", "hidden": [8], "keys": ["state"]}
CHAIN = {"id": "diffusion", "width": 8, "num_blocks": 1, "denoising_steps": 3, "keys": ["state"]}
CRITIC = {"id": "sac", "critic_hidden": [8], "batch_size": 8}
COLLECT, EVALUATE, DEMONSTRATE = (
    {"collect": {"episodes": 4}},
    {"evaluate": {"episodes": 3}},
    {"demonstrate": {"episodes": 2}},
)


class Leaning:
    """A demonstrator that always goes one way."""

    def __init__(self, *, noise=0.0, way=0.5):
        self.noise, self.way = noise, way

    def act(self, observation, rng):
        action = np.full((len(observation["state"]), 2), self.way)
        return (action + self.noise * rng.standard_normal(action.shape)).clip(-1, 1).astype(np.float32)


class Contrary(Leaning):
    """It goes the other way."""

    def __init__(self, *, noise=0.0):
        super().__init__(noise=noise, way=-0.5)


registry.register("demonstrator", "Moody-v0")(Leaning)
registry.register("demonstrator", "contrary")(Contrary)


# --- a run, and all that it leaves ------------------------------------------------------------------------------------

CLOCKS = ("seconds", "wall", "time", "per_second", "started", "finished", "host", "pid")
WORDS = ("title", "stage_name")  # they repeat the options


def run(tree, *, shown=False, report=False):
    """Weights, experience and files of a run, without what a clock wrote into them.

    Raises:
        UserError: refused, before anything ran.
    """
    recipe = parse(Recipe, {"name": "walk", "agent": SMALL, "buffer": {"capacity": 600}, "threads": 1, **tree})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        path = Path(folder) / "run"
        try:
            session = train(recipe, path, quiet=not shown, report=report)
        except EnvironmentFailure as failure:
            return "stopped", str(failure)
        except UserError as error:
            assert not (path / "stages.json").exists(), f"refused late, after a stage has run: {error}"
            raise
        files = [each for each in sorted(path.rglob("*.json*")) if "checkpoints" not in each.parts]
        written = {str(each.relative_to(path)): without_clocks(content(each)) for each in files}
        names = sorted(each.name for each in path.iterdir())
        counters = {name: value for name, value in session.counters.items() if name != "seconds"}
        left = session.agent.state_dict(), session.buffer_state(), written, names, counters, session.threads
        return *left, bool(said.getvalue())


def content(path):
    """Of a file of JSON, or of lines of it."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def without_clocks(tree):
    """The same without times, places and words."""
    if isinstance(tree, list):
        return [without_clocks(one) for one in tree]
    if not isinstance(tree, dict):
        return "" if isinstance(tree, str) and tree.startswith("/") else tree
    return {k: without_clocks(v) for k, v in tree.items() if k not in WORDS and not any(word in k for word in CLOCKS)}


# --- stages ----------------------------------------------------------------------------------------------------------

FINETUNE = {"objective": CRITIC, "decisions": 16, "decisions_per_iteration": 8, "updates_per_decision": 0.25}
SB3 = {"decisions": 32, "evaluate_every": 16, "evaluate_episodes": 2}
SB3 |= {"options": {"learning_starts": 14, "batch_size": 4, "policy_kwargs": {"net_arch": [4]}}}
OTHER_OBJECTIVE = {**CRITIC, "gamma": 0.5}
STAGES = {  # word: (its options, stages before, stages behind, other values, contexts, situations)
    "pretrain": (
        {"objective": CRITIC, "updates": 4},
        [COLLECT, DEMONSTRATE],
        [],
        {"only": ["critic"], "objective": OTHER_OBJECTIVE, "evaluate_every": 2, "log_every": 2},
        {"evaluate_episodes": {"evaluate_every": 2}},
        {},
    ),
    "finetune": (
        FINETUNE,
        [DEMONSTRATE],
        [],
        {"objective": OTHER_OBJECTIVE, "evaluate_every": 8, "episodes_per_iteration": 2, "decisions": 24}
        | {"until": {"minutes": 1e-9}, "until.success": 0.0, "until.minutes": 1e-9, "curriculum": {"id": "value"}},
        {
            "evaluate_episodes": {"evaluate_every": 8},
            "until.success": {"evaluate_every": 8},
            "episodes_per_iteration": {"decisions_per_iteration": None},
        },
        {"curriculum": "foreseen"},
    ),
    "collect": ({"episodes": 4}, [], [], {"episodes": 6, "group_size": 2}, {}, {}),
    "revisit": (
        {"episodes": 4},
        [{"demonstrate": {"episodes": 6}}],
        [],
        {"episodes": 6, "below": -8.0, "share": 0.3},
        {},
        {},
    ),
    "warm_up": ({"decisions": 8}, [], [], {"decisions": 12}, {}, {}),
    "demonstrate": ({"episodes": 2}, [], [], {"with": "contrary", "options": {"way": 0.1}}, {}, {}),
    "load": ({"outside": 0.5}, [], [], {"max_episodes": 2, "outside": 0.0}, {}, {}),
    "evaluate": ({"episodes": 3}, [], [], {"name": "mine", "sheet": 1, "video": "failure"}, {}, {}),
    "repeat": ({"times": 1, "stages": [COLLECT]}, [], [], {"stages": [EVALUATE]}, {}, {}),
    "adapt": ({"with": "residual"}, [], [COLLECT], {"with": "lora", "options": {"scale": 0.1}}, {}, {}),
    "environment": ({"options": {}}, [], [COLLECT], {"options": {"stride": 0.1}}, {}, {}),
    "student": ({"agent": SMALL}, [COLLECT], [COLLECT], {"agent": {**SMALL, "hidden": [4]}}, {}, {}),
    "load_policy": ({}, [], [COLLECT], {"checkpoint": "best", "parts": ["policy", "critic"]}, {}, {}),
    "sb3": (
        SB3,
        [],
        [],
        {"algorithm": "TD3", "decisions": 64, "max_seconds": 0.0, "until": 0.0, "hindsight": False}
        | {"options": {**SB3["options"], "gamma": 0.5}, "evaluate_every": 32},
        {},
        {"hindsight": "goal"},
    ),
}
LIMITS = {"load": {"outside": "outside"}}


def stage(word, options, situation):
    """The run of a stage between others."""
    _, before, behind, *_ = STAGES[word]
    if situation == "foreseen":
        options = {**options, "objective": {"id": "digirl", "batch_size": 8, "value_hidden": [8]}}
    env = {"id": "Goal-v0", "num_envs": 2} if situation == "goal" else {**MOODY, "options": {"pixels": word != "sb3"}}
    agent = {"id": "gaussian", "hidden": [8]} if situation == "goal" else SMALL
    return run({"env": env, "agent": agent, "stages": [*before, {word: options}, *behind]})


def of_stage(word, folder):
    """The walk over one stage's options."""
    base, _, _, values, contexts, situations = STAGES[word]
    if word == "load":
        base, values = base | {"file": episodes(folder, 0)}, values | {"file": episodes(folder, 1)}
    if word == "load_policy":
        base, values = base | {"run": teacher(folder, 0)}, values | {"run": teacher(folder, 1)}
    config, made = registry.find("stage", word).Config, functools.partial(stage, word)
    return Walk(f"stage {word}", config, made, base, values, contexts, situations, limits=LIMITS.get(word, {}))


def episodes(folder, seed):
    """A file of six episodes, one action in five outside the space."""
    found, path = [], folder / f"episodes-{seed}.safetensors"
    for number in range(6):
        rng = np.random.default_rng((seed, number))
        action = rng.uniform(-0.9, 0.9, (5, 2)).astype(np.float32)
        action[0] = 1.5
        seen = {"state": rng.normal(size=(6, 2)).astype(np.float32), "pixels": np.zeros((6, 3, 3, 1), np.uint8)}
        found.append(Trajectory(seen, action, np.ones(5, np.float32), "truncated", source=Source.DEMONSTRATION))
    write_trajectories(path, found)
    return str(path)


def teacher(folder, seed):
    """A run whose best policy is not its last one."""
    path = folder / f"teacher-{seed}"
    learn = {"objective": CRITIC, "updates": 6, "log_every": 2, "evaluate_every": 2, "evaluate_episodes": 4}
    learn |= {"learner": {"learning_rate": 0.3}}
    tree = {"env": MOODY, "agent": SMALL, "stages": [COLLECT, {"pretrain": learn}], "seed": seed, "threads": 1}
    train(parse(Recipe, tree), path, quiet=True, report=False)
    return str(path)


# --- what is no stage -----------------------------------------------------------------------------------------------


def learn(options, situation):
    """Learning from a few episodes, with what it computes."""
    stage = {"objective": {"id": "bc", "batch_size": 8}, "updates": 4, "log_every": 2, "learner": options}
    with Work() if situation == "work" else contextlib.nullcontext() as work:
        return run({"env": MOODY, "stages": [COLLECT, {"pretrain": stage}]}), work and work.count


def keep(options, situation):
    """Collecting twice."""
    env = {**MOODY, "id": "Telling-v0"}
    return run({"env": env, "buffer": {"capacity": 80, **options}, "stages": [COLLECT, COLLECT, COLLECT]})


def step(options, situation):
    """Collecting and evaluating, with a policy that draws for all environments together."""
    if situation == "broken":
        options = {**options, "id": "Zoo-v0", "options": {"share": 0.5}}
        stages = [{"collect": {"episodes": 12}}]
        return run({"env": options, "agent": {"id": "gaussian", "hidden": [8]}, "stages": stages})
    return run({"env": options, "agent": CHAIN, "stages": [COLLECT, EVALUATE]})


def log(options, situation):
    """A run with logs; Weights & Biases is told only."""
    import wandb

    told = []

    class Silent:
        def __getattr__(self, name):
            return lambda *arguments, **options: None

    def init(**options):
        told.append({name: options[name] for name in ("project", "mode")})
        return Silent()

    tree = {"env": MOODY, "plugins": ["walked_plugin"], "logging": options, "stages": [COLLECT]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "init", init)
        return run(tree, shown=situation == "shown"), told


def whole(options, situation):
    """A recipe."""
    stages = [COLLECT, {"pretrain": {"objective": {"id": "bc", "batch_size": 8}, "updates": 4, "log_every": 2}}]
    tree = {"env": MOODY, "stages": stages, "checkpoint_seconds": 1e6, **options}
    try:
        return run(tree, report=situation == "report")
    finally:
        torch.set_num_threads(1)


LEARNER = Walk(
    "learner",
    LearnerConfig,
    learn,
    values={"learning_rates": {"policy": 0.1}, "clip_norm": 1e-3, "epsilon": 1e-2, "weight_decay": 0.1},
    situations={"micro_batch": "work", "micro_units": "work"},
    exempt={"compile": "the same numbers from other code (tests/learning)"},
)
BUFFER = Walk("buffer", BufferConfig, keep, values={"capacity": 60, "streams": ["way/left"]})
ENV = Walk(
    "env",
    EnvConfig,
    step,
    MOODY,
    values={"id": "Brisk-v0", "options": {"stride": 0.1}, "evaluation_envs": 3, "max_incidents": 0.0, "pool": "native"}
    | {"wrappers": [{"id": "TimeLimit", "max_episode_steps": 3}]},
    situations={"max_incidents": "broken"},
    limits={"pool": "has no native vector form"},
    exempt={
        "num_workers": "how many processes share the work is no business of the results (tests/pools)",
        "deadline": "how long a hanging environment is waited for (tests/pools)",
        "splits": "who waits for whom where environments are processes (tests/experience/test_splits.py)",
    },
)
LOGS = Walk(
    "logging",
    LogConfig,
    log,
    {"console": False},
    values={"console": True, "wandb": "offline", "project": "mine", "plugins": {"counting": {}}},
    contexts={"project": {"wandb": "offline"}},
    situations={"console": "shown"},
)
RECIPE = Walk(
    "recipe",
    Recipe,
    whole,
    values={"agent": {**SMALL, "hidden": [4]}, "stages": [COLLECT], "name": "other", "plugins": ["walked_plugin"]}
    | {"checkpoint_seconds": 0.0, "device": "cuda:99"},
    situations={"name": "report"},
    exempt={
        "description": "a line of `erft list recipes`",
        "inputs": "written by the run, compared when its policy is loaded (tests/runs/test_trained.py)",
    },
    limits={"device": "cuda:99"},
)


def walks(folder):
    """All of this file."""
    return [*(of_stage(word, folder) for word in STAGES), LEARNER, BUFFER, ENV, LOGS, RECIPE]


@pytest.mark.parametrize("word", sorted(STAGES))
def test_options_of_stages(word, tmp_path):
    found = tally([of_stage(word, tmp_path)])
    print(found)
    assert not found["dead"], found["dead"]


def test_every_stage_is_walked():
    assert set(STAGES) == set(registry.shipped("stage"))


@pytest.mark.parametrize("walk", [LEARNER, BUFFER, ENV, LOGS, RECIPE], ids=lambda walk: walk.what)
def test_options_of_what_is_no_stage(walk):
    found = tally([walk])
    print(found)
    assert not found["dead"], found["dead"]


def test_a_planted_option_without_effect_is_found(monkeypatch, tmp_path):
    monkeypatch.setitem(registry._tables, "stage", dict(registry._tables["stage"]))
    monkeypatch.setitem(STAGES, "planted", STAGES["collect"])

    @registry.register("stage", "planted")
    class Planted(Collect):
        @dataclass(config=STRICT, kw_only=True)
        class Config(Collect.Config):
            idle: float = 0.5  # read by nobody

    assert tally([of_stage("planted", tmp_path)])["dead"] == ["stage planted.idle"]
