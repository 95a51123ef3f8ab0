"""Logs under damage: cut back to whole lines, links refused, full disks named, text that stays text in any locale."""

import csv
import json
import os
import subprocess
import sys

import pytest

from embodied_rft.cli import main
from embodied_rft.options import ConfigError
from embodied_rft.runs.console import Console
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import LogConfig, Logger, read_records
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.runs.sinks import Axis

NASTY = "[/red] \x1b]0;title\x07 \N{GREEK SMALL LETTER PI}"


def write(logger, count, *, start=0):
    for i in range(start, start + count):
        logger.log({"loss": 1 / (i + 1)}, stage=[1], decisions=i, updates=i, seconds=0.5)


def updates(folder):
    return [record["updates"] for record in read_records(RunFolder(folder).metrics)]


DAMAGE = {
    "half a line in the middle": lambda lines: [*lines[:2], lines[2][:9] + b"\n", *lines[3:]],
    "two lines glued together": lambda lines: [*lines[:2], lines[2][:-1] + lines[3], *lines[4:]],
    "zeros": lambda lines: [*lines[:2], bytes(len(lines[2])), *lines[3:]],
    "not UTF-8": lambda lines: [*lines[:2], b"\xff" + lines[2][1:], *lines[3:]],
    "no object": lambda lines: [*lines[:2], b"7\n", *lines[3:]],
    "half a line at the end": lambda lines: [*lines[:4], lines[4][:12]],
    "no line end at the end": lambda lines: [*lines[:4], lines[4][:-1]],
    "lines lost": lambda lines: lines[:3],
    "all lost": lambda lines: [],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_cut_back_to_whole_lines_and_goes_on(tmp_path, capsys, damage):
    logger = Logger(tmp_path, quiet=True)
    write(logger, 5)
    state = logger.state_dict()
    logger.close()
    path = RunFolder(tmp_path).metrics
    path.write_bytes(b"".join(DAMAGE[damage](path.read_bytes().splitlines(keepends=True))))
    left = updates(tmp_path)  # reading passes over what is damaged
    assert len(left) < 5
    logger = Logger(tmp_path)
    logger.load_state_dict(state)
    write(logger, 2, start=5)
    state = logger.state_dict()
    logger.close()
    said = capsys.readouterr().out
    assert str(path) in said and f"{len(left)} of 5 lines are left" in said
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["updates"] for line in lines] == [*left, 5, 6]  # every line is whole
    assert state["bytes"] == path.stat().st_size
    with open(RunFolder(tmp_path).table, newline="") as file:
        assert [int(row["updates"]) for row in csv.DictReader(file)] == [*left, 5, 6]
    logger = Logger(tmp_path)
    logger.load_state_dict(state)  # and the next resume is exact again
    write(logger, 1, start=7)
    logger.close()
    assert updates(tmp_path) == [*left, 5, 6, 7] and "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log"])
def test_links_are_refused_and_their_targets_left_alone(tmp_path, name):
    target = tmp_path / "precious"
    target.write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    logger = Logger(tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link"):
        write(logger, 1) if name == "metrics.jsonl" else logger.message("hello")
    assert target.read_text() == "keep"


FULL = """
import resource, sys
from embodied_rft.runs.log import LogConfig, Logger
logger = Logger(sys.argv[1], LogConfig(csv=sys.argv[2] == "csv"))
logger.log({"a": 1.0}, stage=[0], decisions=0, updates=0, seconds=0.0)
size = 800 if sys.argv[2] == "lines" else 2_000_000
if sys.argv[2] == "csv":
    logger._sinks[0]._file.close()
    logger._sinks[0]._file = open("/dev/full", "ab", buffering=0)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for i in range(20):
    logger.log({"a": 1.0}, stage=[0], decisions=i, updates=i, seconds=0.0)
logger.close()
"""


def full(folder, what):
    return subprocess.run([sys.executable, "-c", FULL, str(folder), what], capture_output=True, text=True)


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path):
    done = full(tmp_path, "lines")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "metrics.jsonl" in last and "cannot be written (" in last and "the same command continues" in last


def test_a_log_that_is_derived_may_fail_without_ending_the_run(tmp_path):
    done = full(tmp_path, "csv")
    assert done.returncode == 0 and len(read_records(RunFolder(tmp_path).metrics)) == 21, done.stderr
    assert done.stdout.count("Table cannot be written (No space left on device)") == 1
    write(Logger(tmp_path, quiet=True), 1)


def test_text_stays_text_on_the_terminal_and_in_files(tmp_path, capsys):
    logger = Logger(tmp_path)
    logger.stage_started([0], NASTY)
    logger.message(":smile: [bold]")
    with logger.progress(NASTY, 3) as bar:
        bar.update(1, name=NASTY)
    said = capsys.readouterr().out
    shown = "[/red] \\x1b]0;title\\x07 \N{GREEK SMALL LETTER PI}"
    assert shown in said and ":smile: [bold]" in said and "\x1b" not in said and "\x07" not in said
    assert shown in RunFolder(tmp_path).messages.read_text(encoding="utf-8")


def test_live_bars_take_any_title(monkeypatch):
    class Terminal:
        encoding, text = "utf-8", ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    stream = Terminal()
    console = Console(stream=stream)
    console.live, console.rich._force_terminal = True, True
    with console.progress("[/red] \x1b]0;title\x07", 3) as bar:
        bar.update(1, name="[/blue]")
        bar.live.refresh()
    assert "[/red] \\x1b]0;title\\x07" in stream.text and "[/blue]" in stream.text and "\x07" not in stream.text


@pytest.mark.parametrize("value", ["=1+1", "+1", "-1+cmd", "@x", "\t=1", "\r=1"])
def test_cells_are_no_formulas(tmp_path, value):
    logger = Logger(tmp_path, quiet=True)
    metrics = {"number": -1.5, value: 2.0, "text": value, "lost": -float("inf")}
    logger.log(metrics, stage=[0], decisions=0, updates=0, seconds=0.0)
    logger.close()
    with open(RunFolder(tmp_path).table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["text"] == f"'{value}" and float(row[f"'{value}"]) == 2.0
    assert row["number"] == "-1.5" and row["lost"] == "-Infinity"


LOCALE = """
import sys
from embodied_rft.runs.log import Logger
logger = Logger(sys.argv[1])
logger.stage_started([0], "Grö\\N{GREEK SMALL LETTER PI}ße")
logger.log({"grö": 1.0}, stage=[0], decisions=0, updates=0, seconds=0.0, name="Grö")
logger.close()
from embodied_rft.cli import main
main(["list", "objectives"])
"""


def test_files_are_utf8_and_the_terminal_survives_whatever_the_locale(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = {**os.environ, **plain}
    (tmp_path / "program.py").write_text(LOCALE, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Gr\\xf6\\u03c0\\xdfe" in done.stdout
    assert "Gröπße" in RunFolder(tmp_path).messages.read_text(encoding="utf-8")
    assert "Grö" in RunFolder(tmp_path).table.read_text(encoding="utf-8")
    assert read_records(RunFolder(tmp_path).metrics)[0]["name"] == "Grö"


def test_numbers_that_are_learned_without_deciding_are_drawn_over_updates():
    axis = Axis()
    lines = [(0, 50), (0, 100), (0, 100), (64, 120), (128, 120), (128, 140)]
    drawn = [axis.points({"decisions": d, "updates": u, "loss": 1.0, "name": "x", "stage": [0]}) for d, u in lines]
    assert [(list(points), x) for points, x in drawn] == [
        (["offline/loss"], 50), (["offline/loss"], 100), (["loss"], 0), (["loss"], 64), (["loss"], 128),
        (["offline/loss"], 140),
    ]  # fmt: skip


def test_wandb_gets_the_recipe_the_axis_and_the_names_of_stages(tmp_path, monkeypatch):
    import wandb

    seen = {"log": [], "metric": []}

    class Run:
        def define_metric(self, name, step_metric):
            seen["metric"].append((name, step_metric))

        def log(self, values, step):
            seen["log"].append((step, values))

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "init", lambda **options: seen.update(options) or Run())
    logger = Logger(tmp_path, LogConfig(wandb="offline"), quiet=True, recipe={"env": {"id": "x"}, "seed": 3})
    logger.log({"loss": 1.0}, stage=[2], decisions=64, updates=8, seconds=0.0, stage_name="finetune: sac")
    logger.close()
    assert seen["config"] == {"env": {"id": "x"}, "seed": 3} and ("*", "decisions") in seen["metric"]
    ((step, values),) = seen["log"]
    assert step == 1 and values["decisions"] == 64 and values["stage_name"] == "finetune: sac" and values["loss"] == 1.0


@pytest.mark.parametrize(
    ("given", "meant"), [("on", "online"), ("true", "online"), ("off", False), ("offline", "offline"), ("false", False)]
)
def test_wandb_is_switched_on_in_words(given, meant):
    assert load_recipe("demo", [f"logging.wandb={given}"]).logging.wandb == meant
    with pytest.raises(ConfigError, match="logging.wandb"):
        load_recipe("demo", ["logging.wandb=of"])


def test_the_command_line_writes_out_what_would_steer_the_terminal(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "no \x1b[31msuch\x07"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "no" in said and "\x1b" not in said and "\x07" not in said
