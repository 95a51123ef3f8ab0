"""Episodes that begin as failed demonstrations did, and go on as the policy does."""

import numpy as np
import pytest

from embodied_rft.data import Source
from embodied_rft.names import UserError
from embodied_rft.options import parse
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train

LAKE = {"env": {"id": "embodied_rft/FrozenLake-v0", "num_envs": 4, "options": {"observation": "state", "slip": 0.3}}}
LAKE |= {"agent": {"id": "categorical", "hidden": [8]}}
TOLD = {"env": {"id": "embodied_rft/ToldFrozenLake-v0", "num_envs": 4}}
TOLD["env"]["options"] = {"style": "short", "parser": "words", "state": True, "turns": 8, "options": {"slip": 0.3}}
TOLD |= {"agent": {"id": "language", "model": {"tiny": {"hidden_size": 16}}, "prompt": "plain", "key": "message"}}
TOLD["agent"] |= {"max_new_tokens": 4, "marks": "words"}


def go(folder, tree, *, noise=0.6, **options):
    """A run that demonstrates and revisits."""
    stages = [{"demonstrate": {"episodes": 12, "noise": noise}}, {"revisit": {"episodes": 16, **options}}]
    recipe = parse(Recipe, {"buffer": {"capacity": 3000}, "threads": 1, "stages": stages, **tree})
    return train(recipe, folder, quiet=True, report=False)


def episodes(buffer, source):
    """(seed, actions, observations, how many decisions have no log-probability) of each."""
    for run in buffer.segments(buffer.rows(source=source)):
        (one,) = buffer.trajectories(run)
        known = [bool(np.size(each) and np.any(each)) for each in one.log_prob]
        seed = int(buffer.columns(run[:1])["seed"][0])
        yield seed, list(one.action), one.observation, known, float(np.sum(one.reward))


@pytest.mark.parametrize("tree", [LAKE, TOLD], ids=["categorical", "language"])
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_they_begin_as_demonstrations_did(tmp_path, tree, share):
    buffer = go(tmp_path, tree, share=share).buffer
    shown = {seed: rest for seed, *rest in episodes(buffer, Source.DEMONSTRATION)}
    led = []
    for seed, actions, seen, known, _ in episodes(buffer, Source.ONLINE):
        count = known.index(True) if True in known else len(known)
        assert all(known[count:]), "after the first own decision all are"
        theirs, there, _, gained = shown[seed]
        assert gained < 1 and [str(a) for a in actions[:count]] == [str(a) for a in theirs[:count]]
        for key in ("state",) if "state" in seen else ("observation",):
            assert np.array_equal(seen[key][: count + 1], there[key][: count + 1]), "the same luck, too"
        led.append(count)
    assert len(led) == 16
    assert len(set(led)) > 2 if share else set(led) == {0}


def test_where_nobody_failed_there_is_nowhere_to_go(tmp_path):
    lake = {**LAKE, "env": {**LAKE["env"], "options": {"observation": "state"}}}
    with pytest.raises(UserError, match="all 12 gained 1 or more: demonstrate with noise"):
        go(tmp_path, lake, noise=0.0)
    with pytest.raises(UserError, match=r"share is 1.5: of each demonstration, in \[0, 1\]"):
        go(tmp_path, lake, share=1.5)
