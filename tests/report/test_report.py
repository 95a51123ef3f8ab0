"""The report: says what the run folder says, in one file without outside resources, whatever parts are missing."""

import json
import re
import subprocess
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from embodied_rft.evaluation import video
from embodied_rft.files import write_json
from embodied_rft.report import figures
from embodied_rft.report.page import write_report
from embodied_rft.runs.facts import write_run_facts
from embodied_rft.runs.log import LogConfig, Logger
from tests.lab import ROOT

FIRST = 2**31


def evaluation(name, results, *, sheet=0, seconds=0.0, decisions=0):
    n, p = len(results), float(np.mean(results))
    centre, half = (p + 1.92 / n) / (1 + 3.84 / n), 1.96 / (1 + 3.84 / n) * np.sqrt(p * (1 - p) / n + 0.96 / n**2)
    low, high = centre - half, min(1.0, centre + half)
    return {
        "name": name, "stage": [0], "sheet": sheet, "seeds": [FIRST + 100_000 * sheet + i for i in range(len(results))],
        "results": [bool(r) for r in results], "episodes": len(results), "successes": int(sum(results)),
        "success": float(np.mean(results)), "low": low, "high": high, "decisions": decisions, "wall_seconds": seconds,
    }  # fmt: skip


def frames(count=20, size=(64, 97)):
    images = np.zeros((count, *size, 3), np.uint8)
    for t in range(count):
        images[t, 20:40, 2 * t : 2 * t + 20] = (250, 120, 20)
    return images


@pytest.fixture
def run(tmp_path):
    """A run like the demo's, with invented numbers: 90 of 200 before, 195 of 200 after."""
    before, after = np.arange(200) % 20 < 9, np.arange(200) % 40 > 0
    write_json(tmp_path / "evaluations" / "2-0.json", evaluation("base <policy>", before, seconds=12))
    for i in range(8):
        results = np.arange(100) < 20 + 10 * i
        write_json(
            tmp_path / "evaluations" / f"5-{i}.json",
            evaluation("curve", results, sheet=1, seconds=25 + 12 * i, decisions=13_000 + 16_000 * i),
        )
    write_json(
        tmp_path / "evaluations" / "6-0.json", evaluation("fine-tuned policy", after, seconds=120, decisions=133_200)
    )
    stages = [
        (
            "demonstrate",
            "demonstrate: 200 episodes, noise 0.4",
            10_000,
            0,
            4.2,
            {"success of the demonstrations": 0.31},
        ),
        ("pretrain", "pretrain: bc", 0, 3000, 6.1, {"policy/loss": 0.02}),
        ("evaluate", "evaluate base policy", 0, 0, 2.2, {"success": 0.45}),
        ("finetune", "finetune: td3", 123_200, 8200, 96.0, {"last success on the curve": 0.96, "x": None}),
        ("evaluate", "evaluate fine-tuned policy", 0, 0, 2.1, {"success": 0.975}),
    ]
    keys = ("word", "title", "decisions", "updates", "seconds", "metrics")
    records = [{"path": [i], **dict(zip(keys, stage, strict=True))} for i, stage in enumerate(stages)]
    write_json(tmp_path / "stages.json", records)
    logger = Logger(tmp_path, LogConfig(console=False))
    logger.message("this run needs 0.1 GB of replay (200,000 rows)")
    for i in range(40):
        metrics = {"collect/success": min(1.0, 0.3 + i / 50), "critic/loss": float("nan")}
        logger.log(metrics, stage=[3], decisions=10_000 + 3200 * i, updates=200 * i, seconds=20 + 2.4 * i)
    logger.close()
    (tmp_path / "recipe.yaml").write_text("name: demo\nseed: 3\nenv: {id: a<b>/FetchPickAndPlace-v0}\n")
    for name, success in (("2-failure", False), ("6-success", True)):
        video.write_video(tmp_path / "videos" / f"{name}.mp4", frames())
        write_json(tmp_path / "videos" / f"{name}.json", {"seed": FIRST + 7, "success": success, "stage": [2]})
    write_run_facts(tmp_path, ["erft", "train", "demo", "--run", "runs/my demo"])
    return tmp_path


class Page(HTMLParser):
    """Collects what must balance and what must not be there."""

    VOID = frozenset({"meta", "br", "img", "hr", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe"), tag
        self.links += [value for key, value in attrs if key in ("src", "href", "data", "xlink:href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_is_whole_and_needs_nothing_from_outside(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert all(link.startswith("data:") for link in page.links) and len(page.links) == 2
    assert not re.search(r"url\(|@import|https?://", text)
    assert "a&lt;b&gt;/Fetch" in text and "base &lt;policy&gt;" in text
    assert [p.name for p in run.glob(".*")] == []


def test_it_says_what_happened(run):
    text = Page(write_report(run).read_text()).text
    for expected in (
        "Success 0.450 → 0.975", "do not overlap: this is an improvement", "200 initial states that training never saw",
        "[0.383, 0.519]", "110 failures became successes", "5 successes became failures",
        "demonstrate: 200 episodes, noise 0.4", "last success on the curve 0.960", "133,200", "11,200", "110.6",
        "erft train demo --run 'runs/my demo'", "this run needs 0.1 GB of replay", "torch 2.",
        "Failure, initial state 2147483655", "fine-tuned policy 2147483648 to 2147483847",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_summary_is_for_machines(run):
    write_report(run)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["recipe"], summary["seed"], summary["decisions"], summary["updates"]) == (
        "demo",
        3,
        133_200,
        11_200,
    )
    assert summary["before"]["successes"] == 90 and summary["after"]["successes"] == 195
    assert summary["verdict"].startswith("success 0.450 -> 0.975 on 200 held-out initial states")
    assert "results" not in summary["after"] and len(summary["commit"]) > 4


def test_without_success_there_are_returns(run):
    for path in (run / "evaluations").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"told": False, "mean_return": -12.5}))
    text = Page(write_report(run).read_text()).text
    assert "Mean return -12.5 -> -12.5" in text and "never said whether an episode succeeded" in text
    assert "improvement" not in text and "Wilson" not in text
    assert "success" not in json.loads((run / "summary.json").read_text())["after"]


@pytest.mark.parametrize("name", ["recipe.yaml", "stages.json", "run.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text("{")
    text = Page(write_report(run).read_text()).text
    assert "Damaged files" in text and name in text and "Success" in text


def test_the_same_folder_gives_the_same_page(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


@pytest.mark.parametrize(
    "before, after, sentence",
    [
        (40, 90, "this is an improvement"),
        (90, 40, "the policy became worse"),
        (60, 62, "more episodes or seeds are needed"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(run, before, after, sentence):
    for path in (run / "evaluations").glob("*.json"):
        path.unlink()
    write_json(run / "evaluations" / "0.json", evaluation("a", np.arange(100) < before))
    write_json(run / "evaluations" / "1.json", evaluation("b", np.arange(100) < after, seconds=9))
    assert sentence in Page(write_report(run).read_text()).text


@pytest.mark.parametrize("missing", ["evaluations", "videos", "stages.json", "metrics.jsonl", "run.json", "run.log"])
def test_a_missing_part_leaves_only_its_section_out(run, missing):
    for path in sorted(run.rglob("*"), reverse=True):
        if path.relative_to(run).parts[0] == missing:
            path.rmdir() if path.is_dir() else path.unlink()
    text = Page(write_report(run).read_text()).text
    assert "How to repeat this" in text
    assert ("No evaluation yet" in text) == (missing == "evaluations")


def test_without_gl_the_page_says_which_package_to_install(run):
    for path in (run / "videos").iterdir():
        path.unlink()
    write_json(run / "videos" / "unavailable.json", {"reason": "no EGL library was found."})
    text = Page(write_report(run).read_text()).text
    assert "no EGL library was found. Install a GL library" in text and "apt-get install libegl1" in text


def test_later_evaluations_are_shown_apart_from_the_verdict(run):
    later = evaluation("policy in FetchPickAndPlace-v4", np.arange(200) < 188, seconds=500) | {
        "environment": "FetchPickAndPlace-v4"
    }
    write_json(run / "evaluations" / "later-official.json", later)
    text = Page(write_report(run).read_text()).text
    assert "Success 0.450 → 0.975" in text and "FetchPickAndPlace-v4, 200 of sheet 0 0.940" in text


def test_one_evaluation_makes_no_comparison(run):
    (run / "evaluations" / "2-0.json").unlink()
    text = Page(write_report(run).read_text()).text
    assert "Success 0.975" in text and "→" not in text.split("Success 0.975")[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        write_report(tmp_path)


def test_run_facts_are_those_of_the_first_start(run):
    write_run_facts(run, ["something", "else"])
    assert json.loads((run / "run.json").read_text())["command"].startswith("erft train")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_run_facts_name_the_commit_of_the_checkout(run):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads((run / "run.json").read_text())["commit"].startswith(head.stdout.strip())


# --- pictures ---


def test_bars_are_as_long_as_the_rates():
    svg = figures.part(
        "success_bars", [figures.Rate("a", 0.5, 0.4, 0.6, "before"), figures.Rate("b", 1.0, 0.98, 1.0, "after")]
    )
    widths = [float(w) for w in re.findall(r'<rect class="(?:before|after)"[^>]* width="([0-9.]+)"', svg)]
    assert widths[1] == 2 * widths[0]


def test_every_initial_state_has_a_square_of_its_colour():
    svg = figures.part("outcome_grid", [True, True, False, False, False], [True, False, True, False, False], columns=3)
    assert re.findall(r'<rect class="(\w+)"', svg) == ["kept", "lost", "gained", "missed", "missed"]


@pytest.mark.parametrize("largest", [0.003, 0.7, 1, 7, 118, 133_200, 2.4e6])
def test_ticks_are_round_and_cover(largest):
    ticks = figures.nice_ticks(largest)
    assert ticks[0] == 0 and ticks[-1] >= largest * (1 - 1e-9) and 3 <= len(ticks) <= 7
    assert np.allclose(np.diff(ticks), ticks[1]) and ticks[-1] < 1.6 * largest
    assert figures.nice_ticks(0) == [0, 1]


# --- films ---


def test_a_film_has_the_frames_that_went_in(tmp_path):
    path = video.write_video(tmp_path / "f.mp4", frames(), fps=25)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == (20, 64, 96, 3)
    assert np.abs(decoded.astype(int) - frames()[:, :64, :96]).mean() < 8
    assert [p.name for p in tmp_path.iterdir()] == ["f.mp4"]


def test_without_the_codec_it_becomes_a_gif(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    path = video.write_video(tmp_path / "f.mp4", frames())
    assert path == tmp_path / "f.gif" and video.data_url(path).startswith("data:image/gif;base64,R0lGOD")


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_what_is_no_film_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"frames \[T, H, W, 3\] uint8"):
        video.write_video(tmp_path / "f.mp4", bad)
