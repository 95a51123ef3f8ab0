"""Tasks have names that follow their content, groups share them, and a panel that has changed is noticed."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import embodied_rft.envs  # noqa: F401
from embodied_rft.data import Decisions
from embodied_rft.evaluation.evaluate import Evaluation, evaluate, evaluation_seeds
from embodied_rft.evaluation.panels import changed_tasks, content_of, panel_of, task_id
from embodied_rft.experience.collect import Collector
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import make_pool
from embodied_rft.runs.folder import RunFolder

KINDS = [
    ("embodied_rft/TextSum-v0", {}),
    ("embodied_rft/Sokoban-v0", {"observation": "both"}),
    ("embodied_rft/ToldFrozenLake-v0", {"observe": "both"}),
    ("embodied_rft/Told-v0", {"of": "CartPole-v1"}),
]


@pytest.mark.parametrize(("id", "options"), KINDS)
def test_siblings_share_a_task_and_other_groups_have_others(id, options):
    pool = make_pool(id, 6, options=options)
    collector = Collector(pool, run_seed=0, group_size=3)
    seen = {}

    def act(observation):
        for row, (episode, seed) in enumerate(zip(collector.schedule.episode, collector.schedule.seed, strict=True)):
            if episode >= 0 and collector.schedule.step[row] == 0:
                seen.setdefault(int(episode) // 3, set()).add(task_id(observation, row, int(seed)))
        actions = ["<answer>0</answer>"] * 6 if isinstance(pool.action_space, spaces.Text) else np.zeros(6, np.int64)
        return Decisions(actions, np.zeros((6, 1), np.float32))

    collector.collect(act, episodes=6)
    assert sorted(seen) == [0, 1] and all(len(names) == 1 for names in seen.values())
    assert seen[0] != seen[1]
    again = make_pool(id, 6, options=options)
    again.reset(collector.schedule.seed)
    first = next(iter(seen[0]))
    names = [task_id(again.observation, row, int(seed)) for row, seed in enumerate(collector.schedule.seed)]
    assert first in names  # in another pool, and in any of its places


def test_content_is_what_is_shown():
    rng = np.random.default_rng(0)
    seen = {"a": rng.normal(size=(2, 3)).astype(np.float32), "b": ["x", "y"], "c": np.array([7, 7])}
    names = {content_of(seen, 0), content_of(seen, 1)}
    for key, value in (("a", seen["a"] + 0.1), ("b", ["z", "y"]), ("c", np.array([8, 7]))):
        names.add(content_of({**seen, key: value}, 0))
    names.add(content_of({"b": ["x"], "a": seen["a"][:1].reshape(1, 3, 1), "c": seen["c"]}, 0))
    assert len(names) == 6
    other = {"c": seen["c"].astype(np.int32), "b": ["x", "y"], "a": seen["a"].astype(np.float64) * (1 + 1e-9)}
    assert content_of(other, 0) == content_of(seen, 0)  # keys in any order, numbers of any width
    assert content_of({**seen, "past": [0, 0], "base_action": [1, 1]}, 0) == content_of(seen, 0)
    assert content_of({"b": ["3+4="]}, 0) == "95a2625a7e666aeb"  # the same on every machine, in every version


class Listed(gymnasium.Env):
    """Shows one of a list of texts, named by an index into it."""

    texts = ["a", "b", "c", "d"]  # noqa: RUF012

    observation_space, action_space = spaces.Text(9), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.texts[seed % len(self.texts)], {}

    def step(self, action):
        return "a", 1.0, True, False, {"is_success": True}


gymnasium.register("panels/Listed-v0", Listed)


def look():
    def act(observation):
        count = len(observation["observation"])
        return Decisions(np.zeros(count, np.int64), np.zeros((count, 1), np.float32))

    return evaluate(act, make_pool("panels/Listed-v0", 2, purpose="evaluation"), evaluation_seeds(8))


def test_an_evaluation_keeps_its_panel_and_notices_another_one(tmp_path, monkeypatch):
    folder, env = RunFolder(tmp_path), EnvConfig("panels/Listed-v0")
    facts = {"stage": (0,), "sheet": 0, "decisions": 0, "wall_seconds": 0.0}
    first = look()
    folder.add_evaluation("0", first, **facts, panel=panel_of(env))
    record = json.loads((folder.evaluations / "0.json").read_text())
    assert [int(name.partition("-")[0]) for name in record["tasks"]] == record["seeds"] == first.seeds
    assert record["panel"] == panel_of(env) and record["changed"] == [] == first.changed
    again = look()
    folder.add_evaluation("1", again, **facts, panel=panel_of(env))
    assert again.changed == [] and again.tasks == first.tasks
    monkeypatch.setattr(Listed, "texts", ["a", "b", "c", "new"])
    later = look()
    folder.add_evaluation("2", later, **facts, panel=panel_of(env))
    assert later.changed == [seed for seed in first.seeds if seed % 4 == 3]
    assert "2 of the seeds showed other tasks in an earlier evaluation" in str(later)
    elsewhere = look()
    folder.add_evaluation("3", elsewhere, **facts, panel=panel_of(EnvConfig("panels/Listed-v0", options={"a": 1})))
    assert elsewhere.changed == []  # other options are other tasks


def test_damaged_and_older_records_say_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.evaluations.mkdir()
    (folder.evaluations / "0.json").write_text("{")
    (folder.evaluations / "1.json").write_text('{"seeds": [1]}')
    outcome = Evaluation([1], [True], [1.0], [1], tasks=["1-ab"])
    folder.add_evaluation("2", outcome, stage=(0,), sheet=0, decisions=0, wall_seconds=0.0, panel="p")
    assert outcome.changed == []
    assert changed_tasks(["1-ab", "2-cd"], "p", [{"panel": "p", "tasks": ["1-ab", "2-ce"]}]) == [2]
