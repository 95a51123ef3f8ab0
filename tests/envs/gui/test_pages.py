"""Pages as environments: seeds, states, answers that are wrong, and browsers that hang, crash and are left behind."""

import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from embodied_rft.envs.gui import browsers, chromium
from embodied_rft.envs.gui.checks import check_browser
from embodied_rft.envs.gui.site import Pages
from embodied_rft.experience.demonstrate import make_demonstrator
from embodied_rft.names import UserError
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.promises import same
from embodied_rft.testing.check_env import check_env
from tests.lab import ROOT
from tests.lab.browsing import Rooms, needs_browser, processes, profiles

ACTS = ["click 30 45", "type Hello", "click [2]", "type Hi, 5%!", "press Control+a", "drag 12 80 60 80", "wait"]


def pool_of(count, **options):
    return make_pool("Rooms-v0", count, options=options)


@pytest.fixture
def pool():
    """Makes pools, and closes them."""
    made = []

    def make(count, **options):
        made.append(pool_of(count, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pages_of(pool):
    """The batch inside a pool."""
    return pool.host.unwrapped.batch


def story(pool, acts, *, seeds=None):
    told = [] if seeds is None else [pool.reset(np.array(seeds))]
    for act in acts:
        answer = pool.step([act] * pool.num_envs)
        told.append((answer.observation, answer.reward, answer.terminated, answer.info))
    return told


def test_where_no_browser_is_one_reads_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EMBODIED_RFT_BROWSER", raising=False)
    assert check_browser().state == "note" and "apt-get install" in check_browser().advice
    with pytest.raises(UserError, match=r"no headless shell of Chromium is installed .*: apt-get install chromium"):
        chromium.Chromium()
    monkeypatch.setenv("EMBODIED_RFT_BROWSER", str(tmp_path / "none"))
    assert check_browser().state == "broken" and "EMBODIED_RFT_BROWSER is" in check_browser().advice
    with pytest.raises(UserError, match="no program that can be run"):
        chromium.Chromium()


def test_a_program_that_is_no_browser_is_a_dead_one(monkeypatch, pool):
    monkeypatch.setenv("EMBODIED_RFT_BROWSER", "/bin/true")
    made = pool(1)
    made.reset(np.array([1]))
    assert set(made.incidents.counts) == {"infrastructure/dead_browser"}


@pytest.mark.browser
def busy(process):
    """Whether a renderer runs on and on."""
    with suppress(psutil.NoSuchProcess):  # gone meanwhile
        return "renderer" in " ".join(process.cmdline()) and process.cpu_percent(0.05) > 60
    return False


@needs_browser
class TestInABrowser:
    def test_the_checker_passes(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env("Rooms-v0", options={"turns": 6})

    def test_seeds_and_answers_are_all_that_counts(self, pool):
        first, second = pool(3), pool(3)
        assert same(story(first, ACTS, seeds=[1, 2, 3]), story(second, ACTS, seeds=[1, 2, 3]))
        single = make_pool("Rooms-v0", 1, kind="sync")
        with_others = story(first, ACTS, seeds=[1, 2, 3])
        alone = story(single, ACTS, seeds=[2])
        single.close()
        assert all(
            (a[0]["image"][0] == b[0]["image"][1]).all() for a, b in zip(alone[1:], with_others[1:], strict=True)
        )

    @pytest.mark.parametrize("workers", [{}, {"kind": "workers", "num_workers": 2}])
    def test_states_go_on_where_they_were(self, workers):
        made = [make_pool("Rooms-v0", 2, **workers) for _ in range(2)]
        try:
            story(made[0], ACTS[:4], seeds=[5, 6])
            state = made[0].get_state()
            made[1].reset(np.array([8, 9]))
            made[1].set_state(state)
            assert same(story(made[0], ACTS[4:]), story(made[1], ACTS[4:]))
            saved = made[0].save(1)
            after = story(made[0], ["type x"])[0][0]["image"][1]
            made[0].restore(0, saved)
            assert (story(made[0], ["type x"])[0][0]["image"][0] == after).all()
        finally:
            for one in made:
                one.close()

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            ("", "empty"),
            ("jump 3 4", "unknown_verb"),
            ("click", "bad_argument"),
            ("click 1e1 2", "bad_argument"),
            ("click nan 2", "bad_argument"),
            ("click 3 4 5", "bad_argument"),
            ("scroll 3 4 99999 0", "bad_argument"),
            ("wait 3", "bad_argument"),
            ("type", "bad_argument"),
            ("click 120 4", "outside"),
            ("click 3 -1", "outside"),
            ("drag 3 4 5 160", "outside"),
            ("click [7]", "no_element"),
            ("press Any", "unknown_key"),
            ("type " + "x" * 501, "too_long"),
        ],
    )
    def test_wrong_answers_move_nothing_and_are_counted(self, shared, answer, kind):
        before = shared.reset(np.array([1]))["image"]
        told = shared.step([answer])
        assert (told.observation["image"] == before).all() and told.reward == [-0.5]
        assert told.info[f"invalid/{kind}"] == [1] and told.observation["message"][0].startswith("? Your answer")

    @pytest.fixture(scope="class")
    def shared(self):
        made = pool_of(1, invalid=-0.5, turns=1)
        yield made
        made.close()

    def test_an_element_that_vanished_is_none(self, pool):
        made = pool(1, state=True, turns=2)
        seen = made.reset(np.array([1]))
        assert seen["state"][0].split("\n")[1] == '[1] button "vanish" 10 40 80 20'
        assert "vanish" not in made.step(["click [1]"]).observation["state"][0]
        assert made.step(["click [2]"]).info["invalid/no_element"] == [1]

    def test_cells_other_parsers_and_experts(self, pool):
        made = pool(2, grid=[6, 16], parser="tags", expert=True, style="short", observe="both")
        seen = made.reset(np.array([1, 2]))
        assert seen["message"][0].startswith('Press OK.\n[0] button "OK"')
        player = make_demonstrator("Rooms-v0", "advised", env_options={"grid": [6, 16], "parser": "tags"})
        answers = player.act(seen, np.random.default_rng(0))
        assert answers == ["<answer>click 2 2</answer>"] * 2
        told = made.step(answers)
        assert (told.reward == 1).all() and told.terminated.all() and told.info["success"].all()

    @pytest.mark.parametrize("task", ["never", "hangs"])
    @pytest.mark.parametrize("where", ["click 5 5", "click 5 45", "click 5 85"])
    def test_a_page_that_hangs_is_one_void_episode(self, pool, task, where):
        if task == "never" and where != "click 5 5":
            pytest.skip("it does not even open")
        made = pool(3, tasks=["calm", task], patience=1.0)
        seeds = np.arange(12)
        rooms = pages_of(made)
        made.reset(seeds[:3])
        hung = [row for row in range(3) if rooms.names[rooms.episodes[row].task] == task]
        answer = made.step([where] * 3)
        counts = made.incidents.counts
        assert set(counts) == {"infrastructure/timeout"} and counts.total() == len(hung) and 0 < len(hung) < 3
        if task == "hangs":
            assert (~answer.valid).nonzero()[0].tolist() == hung
        assert len(rooms.browsers.browsers) == 1  # only the tab is replaced
        assert not [one for one in processes() if busy(one)]

    def test_a_tab_that_is_killed_is_one_void_episode(self, pool):
        made = pool(3)
        made.reset(np.arange(3))
        rooms = pages_of(made)
        quiet = story(made, ["type a"])[0][0]["image"][[0, 2]]
        kill_renderer(rooms, 1)
        answer = made.step(["type b"] * 3)
        assert answer.valid.tolist() == [True, False, True] and set(made.incidents.counts) == {"infrastructure/crashed"}
        assert (answer.observation["image"][[0, 2]] == quiet).mean() > 0.5
        made.reset(np.arange(3), ~answer.valid)
        assert made.step(["type b"] * 3).valid.all()

    def test_a_browser_that_is_killed_voids_its_episodes_and_another_takes_over(self, pool, monkeypatch):
        monkeypatch.setattr(browsers, "TABS_EACH", 2)
        made = pool(3)
        made.reset(np.arange(3))
        first, second = pages_of(made).browsers.browsers
        for process in processes(first.process.profile):
            process.kill()
        answer = made.step(["wait"] * 3)
        assert answer.valid.tolist() == [False, False, True] and set(made.incidents.counts) == {
            "infrastructure/dead_browser"
        }
        made.reset(np.arange(3), ~answer.valid)
        assert made.step(["wait"] * 3).valid.all() and second in pages_of(made).browsers.browsers

    def test_browsers_are_recycled_and_put_to_rest(self, pool, monkeypatch):
        made, other = pool(2, recycle=2), pool(1)
        reference = pool(2)
        rooms, seen = pages_of(made), set()
        for seed in range(4):
            assert same(made.reset(np.array([seed, seed + 1])), reference.reset(np.array([seed, seed + 1])))
            seen |= {browser.process.profile for browser in rooms.browsers.browsers}
            assert len(rooms.browsers.browsers) == 1
        assert len(seen) == 4 and len(seen & set(map(str, profiles()))) == 1
        story(made, ACTS[:2])
        story(reference, ACTS[:2])
        monkeypatch.setattr(browsers, "IDLE", -1.0)  # whoever is not used now
        other.reset(np.array([1]))
        monkeypatch.undo()
        assert rooms.browsers.browsers == []
        assert same(story(made, ACTS[2:]), story(reference, ACTS[2:]))  # they were played again

    def test_nothing_is_left(self, pool):
        before, open_files = profiles(), len(os.listdir("/proc/self/fd"))
        made = pool_of(2)
        made.reset(np.arange(2))
        (profile,) = profiles() - before
        assert processes(str(profile))
        made.close()
        assert not processes(str(profile)) and not profile.exists() and len(os.listdir("/proc/self/fd")) == open_files

    @pytest.mark.parametrize("end", ["kill", "raise"])
    def test_nothing_is_left_of_who_is_killed_or_raises(self, end):
        script = (
            "import numpy as np, sys; from tests.lab.browsing import *; from embodied_rft.pools.pool import make_pool\n"
            "pool = make_pool('Rooms-v0', 2); pool.reset(np.arange(2))\n"
            "print(pool.host.unwrapped.batch.browsers.browsers[0].process.profile, flush=True)\n"
            "sys.stdin.readline(); raise RuntimeError('over')\n"
        )
        trainer = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, cwd=ROOT,
        )  # fmt: skip
        profile = trainer.stdout.readline().strip()
        keepers = [one for one in psutil.process_iter() if one.name() == "sh" and profile in one.cmdline()]
        assert processes(profile) and len(keepers) == 1
        if end == "kill":
            os.kill(trainer.pid, signal.SIGKILL)
        trainer.communicate("")
        keepers[0].wait(20)
        assert not processes(profile) and not Path(profile).exists()


def kill_renderer(rooms, row):
    """Kill the process that draws the page of a row, as the kernel does when memory is short."""
    tab = rooms.browsers.places[row][1]
    tab.send("Page.crash")


def test_options_that_cannot_be_are_refused():
    for options, message in (
        ({"grid": [0, 3]}, r"grid is \[0, 3\]"),
        ({"grid": [3]}, r"grid is \[3\]; expected \[columns, rows\]"),
        ({"observe": "images"}, "did you mean 'image'"),
        ({"turns": 0}, "turns is 0"),
        ({"recycle": 0}, "recycle is 0"),
        ({"patience": 0}, "patience is 0"),
    ):
        with pytest.raises(UserError, match=message):
            Pages(Rooms(), num_envs=1, **options)
