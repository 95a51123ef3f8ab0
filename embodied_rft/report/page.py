"""One self-contained HTML page, and one JSON file, that say what a run did.

Reads the run folder (see `runs.folder`), nothing else. Missing parts leave their section out, so a run that was stopped
has a report too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from embodied_rft.evaluation import video
from embodied_rft.evaluation.evaluate import SILENT, counted
from embodied_rft.files import write_atomically, write_json
from embodied_rft.names import visible
from embodied_rft.report import figures
from embodied_rft.report.conversations import said_in
from embodied_rft.report.run import Run
from embodied_rft.runs.console import describe
from embodied_rft.runs.facts import run_facts
from embodied_rft.runs.folder import RunFolder

INSTALL_GL = "Install a GL library (Debian, Ubuntu: apt-get install libegl1 libegl-mesa0) and run erft doctor."


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write report.html and summary.json into a run folder; returns the path of the page.

    Raises:
        ValueError: the folder holds no run.
    """
    folder = RunFolder(run_folder)
    run = Run.read(folder)
    run.facts = run.facts or run_facts()
    films = _films(run)
    said, without = said_in(run)
    page = figures.TEMPLATES.get_template("page.html").render(
        run=run,
        name=run.recipe.get("name", folder.path.name),
        title=_headline(run),
        verdict=verdict(run),
        rates=_rates(run),
        outcomes=_outcomes(run),
        curves=_curves(run),
        said=said,
        without=without,
        incidents=incidents(run),
        films=films,
        no_films="" if films else _no_films(run),
        totals=_totals(run),
        facts=_facts(run),
        describe=describe,
    )
    write_json(folder.summary, summary(run))
    write_atomically(folder.report, visible(page))
    return folder.report


def summary(run: Run) -> dict[str, Any]:
    """The run in a few numbers, for machines."""
    success = ("success", "low", "high", "successes") if run.told else ()
    keys = ("name", *success, "mean_return", "episodes", "left_out", "decisions", "wall_seconds")
    brief = [{key: e[key] for key in keys if key in e} for e in run.verdicts]
    return {
        "recipe": run.recipe.get("name"),
        "seed": run.recipe.get("seed"),
        "verdict": f"{_headline(run)}. {verdict(run)}",
        "before": brief[0] if len(brief) > 1 else None,
        "after": brief[-1] if brief else None,
        "evaluations": brief,
        **_totals(run),
        "stages": run.stages,
        "commit": run.facts.get("commit"),
        "command": run.facts.get("command"),
    }


def _totals(run: Run) -> dict[str, Any]:
    return {key: sum(stage.get(key) or 0 for stage in run.stages) for key in ("decisions", "updates", "seconds")}


# --- the verdict -------------------------------------------------------------------------------------


def _headline(run: Run) -> str:
    if not run.verdicts:
        return "no evaluation yet"
    first, last = run.verdicts[0], run.verdicts[-1]
    if not run.told:
        arrow = f"{first['mean_return']:.4g} -> " if len(run.verdicts) > 1 else ""
        return f"mean return {arrow}{last['mean_return']:.4g} on {counted(last['episodes'], last.get('states'))}"
    arrow = f"{first['success']:.3f} -> " if len(run.verdicts) > 1 else ""
    return f"success {arrow}{last['success']:.3f} on {counted(last['episodes'], last.get('states'))}"


def verdict(run: Run) -> str:
    """One or two sentences that claim no more than the intervals allow."""
    if not run.verdicts:
        return "The recipe has no finished evaluate stage, so nothing can be said about success."
    last = run.verdicts[-1]
    measured = counted(last["episodes"], last.get("states")).replace("held-out ", "")
    text = f"Measured greedily on {measured} that training never saw."
    if last.get("left_out"):
        text += f" {len(last['left_out'])} more were left out: the environment failed on them each time."
    if not run.told:
        text += f" {SILENT[0].upper()}{SILENT[1:]}: there is no success rate to judge by."
    elif len(run.verdicts) > 1:
        first = run.verdicts[0]
        if last["low"] > first["high"]:
            text += " The 95 % intervals do not overlap: this is an improvement."
        elif last["high"] < first["low"]:
            text += " The 95 % intervals do not overlap: the policy became worse."
        else:
            text += " The 95 % intervals overlap: more episodes or seeds are needed to tell the two apart."
    totals = _totals(run)
    return f"{text} {_duration(totals['seconds'])} and {totals['decisions']:,} environment decisions in all."


def incidents(run: Run) -> str:
    """What went wrong in the environments, apart from how episodes ended; nothing where all went well."""
    counts = run.incidents.get("counts")
    counts = {k: n for k, n in counts.items() if isinstance(n, int) and n > 0} if isinstance(counts, dict) else {}
    if not counts:
        return ""
    kinds = ", ".join(f"{visible(str(kind))} {count}" for kind, count in sorted(counts.items()))
    return (
        f"{sum(counts.values())} incidents in environments ({kinds}): no failures of the policy, and never trained on."
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


# --- what the sections show --------------------------------------------------------------------------


def _rates(run: Run) -> list[figures.Rate]:
    css = ["before"] * (len(run.verdicts) - 1) + ["after"]
    rates = [
        figures.Rate(e.get("name") or "policy", e["success"], e["low"], e["high"], of)
        for e, of in zip(run.verdicts, css, strict=False)
    ]
    return rates + [_later_rate(e) for e in run.later]


def _outcomes(run: Run) -> list[tuple[str, str]]:
    """(class, how many initial states had this outcome), where the first and the last verdict are on the same ones."""
    if not run.verdicts or not run.paired:
        return []
    pairs = [*zip(run.verdicts[0]["results"], run.verdicts[-1]["results"])]
    kinds = {
        "gained": ((False, True), "failures became successes"),
        "kept": ((True, True), "successes stayed"),
        "lost": ((True, False), "successes became failures"),
        "missed": ((False, False), "failures stayed"),
    }
    return [(css, f"{pairs.count(pair)} {text}") for css, (pair, text) in kinds.items()]


def _later_rate(evaluation: dict[str, Any]) -> figures.Rate:
    where, sheet = evaluation["environment"].rpartition("/")[2], evaluation.get("sheet", 0)
    label = f"{where}, {evaluation['episodes']} of sheet {sheet}"
    return figures.Rate(label, evaluation["success"], evaluation["low"], evaluation["high"], "kept")


def _curves(run: Run) -> dict[str, Any] | None:
    """Pictures over time and over experience, and what their colours mean; None: there are no two points."""
    points = sorted(run.curve + run.verdicts, key=lambda e: e.get("wall_seconds", 0))
    told = any(e.get("told", True) for e in points) or any("collect/success" in r for r in run.metrics)
    name, key_of_points = ("success", "success") if told else ("return", "mean_return")
    training = [r for r in run.metrics if isinstance(r.get(f"collect/{name}"), (int, float))]
    if len(points) + len(training) < 2:
        return None
    values = _column(training, f"collect/{name}") + _column(points, key_of_points)
    bounds, interval = ((0.0, 1.0), ", 95 % interval") if told else (figures.nice_bounds(values), "")
    pictures = []
    for x_label, key, record_key, stage_key, form in (
        ("wall time (s)", "wall_seconds", "wall/seconds", "seconds", lambda x: f"{x:,.0f}"),
        ("environment decisions", "decisions", "decisions", "decisions", _thousands),
    ):
        curves = [
            figures.Curve(
                "training", _column(training, record_key), _column(training, f"collect/{name}"), "train", dots=False
            ),
            figures.Curve(
                "held-out",
                _column(points, key),
                _column(points, key_of_points),
                "after",
                _column(points, "low") if told else [],
                _column(points, "high") if told else [],
            ),
        ]
        ends, marks = 0.0, []
        for stage in run.stages:
            ends += stage.get(stage_key) or 0
            marks.append((ends, f"end of {stage.get('title', stage.get('word'))}"))
        labels: dict[str, Any] = {"x_label": x_label, "x_format": form, "y_label": name, "bounds": bounds}
        pictures.append(figures.learning_curves(curves, **labels, marks=marks[:-1]))
    shown = {"after": f"{name} on held-out initial states{interval}", "train": f"{name} of episodes for training"}
    return {"pictures": pictures, "legend": shown.items()}


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [float(record.get(key) or 0) for record in records]


def _thousands(x: float) -> str:
    return f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"


def _films(run: Run) -> list[tuple[str, str, str]]:
    """(caption, kind of file, its content as a URL) of each film."""
    films = []
    for path in run.folder.films():
        about = run.about(path)
        outcome = {True: "Success", False: "Failure"}.get(about.get("success"), path.stem)  # type: ignore[arg-type]
        caption = f"{outcome}, initial state {about['seed']}" if "seed" in about else outcome
        films.append((caption, path.suffix, video.data_url(path)))
    return films


def _no_films(run: Run) -> str:
    """Why there are none, where somebody might ask."""
    if reason := run.unavailable.get("reason"):
        return f"No videos: {reason} {INSTALL_GL}"
    return "This run filmed no episode." if any(stage.get("word") == "evaluate" for stage in run.stages) else ""


def _facts(run: Run) -> list[tuple[str, Any]]:
    facts = run.facts
    seeds = [f"run {run.recipe.get('seed', '?')}"]
    seeds += [
        f"{e.get('name') or 'evaluation'} {e['seeds'][0]} to {e['seeds'][-1]}"
        for e in run.verdicts[-1:]
        if e.get("seeds")
    ]
    cores = f"{facts.get('cores', '?')} cores, {facts.get('memory_gib', '?')} GiB, {facts.get('gpu') or 'no GPU'}"
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items() if version)
    memory = next((line for line in run.messages.splitlines() if "this run needs" in line.lower()), None)
    return [
        ("command", facts.get("command")), ("commit", facts.get("commit")), ("started", facts.get("started")),
        ("seeds", "; ".join(seeds)), ("machine", f"{facts.get('processor', '?')}, {cores}"),
        ("system", facts.get("system")), ("versions", versions), ("memory", memory),
    ]  # fmt: skip
