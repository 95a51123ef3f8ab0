"""Logs: exact resume, one column a metric, third-party sinks, TensorBoard and offline wandb, the terminal."""

import csv
import io
import json

import numpy as np
import pytest
import torch

from embodied_rft import registry
from embodied_rft.files import write_json
from embodied_rft.runs.console import Console, describe, number
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import LogConfig, Logger, read_records
from embodied_rft.runs.sinks import Sink


def write(logger, count, *, start=0, extra=None):
    for i in range(start, start + count):
        metrics = {"critic/loss": 1 / (i + 1), **(extra or {})}
        logger.log(metrics, stage=[1, 0], decisions=64 * i, updates=i, seconds=0.5 * i)


def table(folder):
    with open(RunFolder(folder).table, newline="") as file:
        return list(csv.DictReader(file))


def without_clock(record):
    return {key: value for key, value in record.items() if not key.startswith("wall/")}


def test_a_line_holds_counters_labels_and_exact_numbers(tmp_path):
    logger = Logger(tmp_path, quiet=True)
    metrics = {"a": torch.tensor(0.1), "b": np.float32(0.1), "c": 1 / 3, "d": float("nan"), "e": -float("inf"), "f": 3}
    logger.log(metrics, stage=[2], decisions=10, updates=4, seconds=1.23456, name="base policy")
    logger.close()
    (record,) = read_records(RunFolder(tmp_path).metrics)
    assert record == {
        "stage": [2], "decisions": 10, "updates": 4, "name": "base policy", "a": float(np.float32(0.1)),
        "b": float(np.float32(0.1)), "c": 1 / 3, "d": "NaN", "e": "-Infinity", "f": 3, "wall/seconds": 1.235,
    }  # fmt: skip
    json.loads(RunFolder(tmp_path).metrics.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_a_new_metric_becomes_a_column_of_the_whole_table(tmp_path):
    logger = Logger(tmp_path, quiet=True)
    write(logger, 2)
    write(logger, 2, start=2, extra={"evaluate/success": 0.5})
    write(logger, 1, start=4)
    logger.close()
    rows = table(tmp_path)
    assert [row["evaluate/success"] for row in rows] == ["", "", "0.5", "0.5", ""]
    assert [row["updates"] for row in rows] == ["0", "1", "2", "3", "4"] and rows[0]["stage"] == "1.0"
    assert float(rows[2]["critic/loss"]) == 1 / 3


@pytest.mark.parametrize("half_line", [b"", b'{"stage": [1], "dec'])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, half_line):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logger = Logger(whole, quiet=True)
    write(logger, 10)
    logger.close()

    logger = Logger(killed, quiet=True)
    write(logger, 4)
    state = json.loads(json.dumps(logger.state_dict()))
    write(logger, 3, start=4, extra={"only/later": 1.0})  # not in the checkpoint: must vanish, column included
    with open(RunFolder(killed).metrics, "ab") as file:
        file.write(half_line)  # the kill came in the middle of a line
    resumed = Logger(killed, quiet=True)
    resumed.load_state_dict(state)
    write(resumed, 6, start=4)
    resumed.close()
    expected, found = read_records(RunFolder(whole).metrics), read_records(RunFolder(killed).metrics)
    assert list(map(without_clock, found)) == list(map(without_clock, expected))
    assert table(killed) == table(whole)
    assert resumed.state_dict() == logger_end(whole)


def logger_end(folder):
    data = RunFolder(folder).metrics.read_bytes()
    return {"bytes": len(data), "lines": data.count(b"\n")}


def test_a_fresh_start_forgets_lines_of_an_attempt_without_checkpoint(tmp_path):
    for _ in range(2):
        logger = Logger(tmp_path, quiet=True)
        write(logger, 3)
        logger.close()
    assert len(read_records(RunFolder(tmp_path).metrics)) == 3 == len(table(tmp_path))


def test_opening_a_finished_run_changes_nothing(tmp_path):
    logger = Logger(tmp_path, quiet=True)
    write(logger, 3)
    logger.close()
    before = RunFolder(tmp_path).metrics.read_bytes()
    Logger(tmp_path, quiet=True).close()
    assert RunFolder(tmp_path).metrics.read_bytes() == before


def test_lost_lines_are_reported_and_survived(tmp_path, capsys):
    logger = Logger(tmp_path)
    logger.load_state_dict({"bytes": 10_000, "lines": 50})
    write(logger, 1)
    assert "lost lines" in capsys.readouterr().out
    assert len(read_records(RunFolder(tmp_path).metrics)) == 1


def test_a_third_party_sink_gets_every_line(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "load_plugins", lambda: None)
    seen: list = []

    class Recorder(Sink):
        def __init__(self, folder, *, step, prefix):
            seen.append((prefix, step))

        def write(self, step, record):
            seen.append((step, record["critic/loss"]))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(registry._tables["logger"], "recorder", Recorder)
    logger = Logger(tmp_path, LogConfig(plugins={"recorder": {"prefix": "p"}}), quiet=True)
    write(logger, 2)
    logger.close()
    assert seen == [("p", 0), (1, 1.0), (2, 0.5), "closed"]
    with pytest.raises(ValueError, match="did you mean 'recorder'"):
        write(Logger(tmp_path, LogConfig(plugins={"recoder": {}}), quiet=True), 1)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LogConfig(tensorboard=True)
    logger = Logger(tmp_path, config, quiet=True)
    write(logger, 3)
    state = logger.state_dict()
    write(logger, 2, start=3)
    logger.close()
    logger = Logger(tmp_path, config, quiet=True)
    logger.load_state_dict(state)
    write(logger, 4, start=3)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("critic/loss")
    assert [point.step for point in points] == [64 * i for i in range(7)]  # decisions
    assert points[4].value == np.float32(1 / 5)


def test_wandb_runs_offline_and_keeps_its_id(tmp_path):
    config = LogConfig(wandb="offline")
    for start in (0, 2):
        logger = Logger(tmp_path, config, quiet=True)
        logger.load_state_dict({"bytes": 0, "lines": start})
        write(logger, 2, start=start)
        logger.close()
    id = (tmp_path / "wandb_id").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(id in run.name for run in runs)  # two within one second: wandb appends "-1"
    assert all(list(run.glob("*.wandb")) for run in runs)


def test_in_a_pipe_progress_is_plain_lines(monkeypatch):
    monkeypatch.setattr("embodied_rft.runs.console.LINE_SECONDS", 0.0)
    stream = io.StringIO()
    console = Console(stream=stream)
    console.measure(0, 0, 0.0)
    console.measure(6400, 50, 2.0)
    with console.progress("finetune", 1000) as bar:
        bar.update(250, success=0.43, nothing=None)
    console.message("[bold] is not markup here")
    assert stream.getvalue().splitlines() == [
        "  finetune: 250 of 1,000  success 0.430  3,200 decisions/s  25 updates/s",
        "[bold] is not markup here",
    ]


def test_on_a_terminal_the_bar_is_live_and_leaves_nothing_behind():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    console = Console(stream=stream)
    console.live = True
    console.rich._force_terminal = True
    with console.progress("pretrain", 10) as bar:
        bar.update(4, success=0.5)
        assert bar.live is not None
        bar.live.refresh()
    assert "pretrain" in stream.getvalue() and "success 0.500" in stream.getvalue()


def test_quiet_says_nothing(tmp_path, capsys):
    logger = Logger(tmp_path, quiet=True)
    logger.message("hello")
    logger.stage_started([0], "pretrain")
    with logger.progress("pretrain", 10) as bar:
        bar.update(4)
    logger.stage_finished({"seconds": 1.0})
    assert capsys.readouterr().out == ""


def test_stage_lines_say_what_happened(tmp_path, capsys):
    logger = Logger(tmp_path)
    logger.stage_started([3, 0], "finetune: td3")
    logger.stage_finished(
        {"seconds": 61.25, "decisions": 130_000, "updates": 0, "metrics": {"success": 0.975, "x": None}}
    )
    assert capsys.readouterr().out == "4.1  finetune: td3\n     61.2 s  130,000 decisions  success 0.975\n"


def test_numbers_for_people():
    assert [number(v) for v in (0.43127, 1.0, 12345, 1234.5, 0.00012, True, "x", 0.0)] == [
        "0.431", "1.000", "12,345", "1,234", "1.20e-04", "True", "x", "0"
    ]  # fmt: skip
    assert describe({"a": 1, "b": None, "c": float("nan")}) == "a 1"


def test_json_files_take_arrays_and_infinities(tmp_path):
    write_json(
        tmp_path / "sub" / "x.json", {"a": np.arange(2), "b": (1.5, float("inf")), "c": tmp_path, "d": np.float32(2)}
    )
    assert json.loads((tmp_path / "sub" / "x.json").read_text()) == {
        "a": [0, 1], "b": [1.5, "Infinity"], "c": str(tmp_path), "d": 2.0
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["x.json"]
