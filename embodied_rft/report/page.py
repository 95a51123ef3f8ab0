"""One self-contained HTML page, and one JSON file, that say what a run did.

Reads the run folder (see `runs.folder`), nothing else. Missing parts leave their section out, so a run that was stopped
has a report too.
"""

from __future__ import annotations

import importlib.resources
import os
import string
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from embodied_rft.evaluation import samples, video
from embodied_rft.evaluation.evaluate import SILENT, counted
from embodied_rft.files import write_atomically, write_json
from embodied_rft.names import visible
from embodied_rft.report import figures
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
    template = string.Template(
        importlib.resources.files("embodied_rft.report").joinpath("page.html").read_text("utf-8")
    )
    sections = [_success(run), _curves(run), _samples(run), _videos(run), _stages(run), _recipe(run), _facts(run)]
    sections.append(_damaged(run))
    name = str(run.recipe.get("name", folder.path.name))
    page = template.substitute(
        title=escape(f"{name}: {_plain_headline(run)}"),
        recipe=escape(name),
        seed=escape(str(run.recipe.get("seed", "?"))),
        headline=_headline(run),
        verdict=escape(verdict(run)),
        sections="\n".join(section for section in sections if section),
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
        "verdict": f"{_plain_headline(run)}. {verdict(run)}",
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


def _plain_headline(run: Run) -> str:
    if not run.verdicts:
        return "no evaluation yet"
    first, last = run.verdicts[0], run.verdicts[-1]
    if not run.told:
        arrow = f"{first['mean_return']:.4g} -> " if len(run.verdicts) > 1 else ""
        return f"mean return {arrow}{last['mean_return']:.4g} on {counted(last['episodes'], last.get('states'))}"
    arrow = f"{first['success']:.3f} -> " if len(run.verdicts) > 1 else ""
    return f"success {arrow}{last['success']:.3f} on {counted(last['episodes'], last.get('states'))}"


def _headline(run: Run) -> str:
    if not run.verdicts:
        return "No evaluation yet"
    if not run.told:
        return escape(_plain_headline(run).partition(" on ")[0].capitalize())
    first, last = run.verdicts[0], run.verdicts[-1]
    css = "bad" if last["success"] < first["success"] else "good"
    before = f'<span class="number">{first["success"]:.3f}</span><span class="arrow">&rarr;</span>'
    return f'Success {before if len(run.verdicts) > 1 else ""}<span class="number {css}">{last["success"]:.3f}</span>'


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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


# --- sections ----------------------------------------------------------------------------------------


def _section(title: str, note: str, body: str) -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section>\n<h2>{title}</h2>\n{note}\n{body}\n</section>"


def _success(run: Run) -> str:
    if not run.verdicts or not run.told:
        return ""
    last = len(run.verdicts) - 1
    rates = [
        figures.Rate(e.get("name") or "policy", e["success"], e["low"], e["high"], "after" if i == last else "before")
        for i, e in enumerate(run.verdicts)
    ]
    rates += [_later_rate(e) for e in run.later]
    body = f"<figure>{figures.success_bars(rates)}</figure>"
    if run.paired:
        before, after = run.verdicts[0]["results"], run.verdicts[-1]["results"]
        kinds = {
            "gained": ("failures became successes", [not a and b for a, b in zip(before, after)]),
            "kept": ("successes stayed", [a and b for a, b in zip(before, after)]),
            "lost": ("successes became failures", [a and not b for a, b in zip(before, after)]),
            "missed": ("failures stayed", [not a and not b for a, b in zip(before, after)]),
        }
        entries = [(css, f"{sum(which)} {text}") for css, (text, which) in kinds.items()]
        body += f'<figure style="margin-top:26px">{figures.outcome_grid(before, after)}{_legend(entries)}</figure>'
    note = "Bars with 95 % Wilson intervals. Every policy started from the same fixed list of held-out initial states."
    return _section("Success", note if run.paired else "Bars with 95 % Wilson intervals.", body)


def _later_rate(evaluation: dict[str, Any]) -> figures.Rate:
    where, sheet = evaluation["environment"].rpartition("/")[2], evaluation.get("sheet", 0)
    label = f"{where}, {evaluation['episodes']} of sheet {sheet}"
    return figures.Rate(label, evaluation["success"], evaluation["low"], evaluation["high"], "kept")


def _legend(entries: list[tuple[str, str]]) -> str:
    items = [
        f'<li><svg viewBox="0 0 13 13" width="13"><rect class="{css}" x="1" y="1" width="11" height="11" rx="2"/></svg>'
        f"{escape(text)}</li>"
        for css, text in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _curves(run: Run) -> str:
    points = sorted(run.curve + run.verdicts, key=lambda e: e.get("wall_seconds", 0))
    told = any(e.get("told", True) for e in points) or any("collect/success" in r for r in run.metrics)
    name, key_of_points = ("success", "success") if told else ("return", "mean_return")
    training = [r for r in run.metrics if isinstance(r.get(f"collect/{name}"), (int, float))]
    if len(points) + len(training) < 2:
        return ""
    values = _column(training, f"collect/{name}") + _column(points, key_of_points)
    bounds, interval = ((0.0, 1.0), ", 95 % interval") if told else (figures.nice_bounds(values), "")
    panels = []
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
        picture = figures.learning_curves(curves, **labels, marks=marks[:-1])
        panels.append(f"<figure>{picture}</figure>")
    legend = _legend(
        [("after", f"{name} on held-out initial states{interval}"), ("train", f"{name} of episodes for training")]
    )
    note = "Dotted lines are the ends of stages. Evaluations take wall time but no environment decisions of training."
    return _section("Learning curve", note, f'<div class="columns">{"".join(panels)}</div>{legend}')


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [float(record.get(key) or 0) for record in records]


def _thousands(x: float) -> str:
    return f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"


def _samples(run: Run) -> str:
    """What agents that write text said, in the first and the last evaluation, and in those of `erft eval`."""
    chosen = [
        e for e in (*run.verdicts[-1:], *run.verdicts[:1][: len(run.verdicts) - 1], *run.later) if e.get("samples")
    ]
    parts = []
    for evaluation in chosen:
        if said := samples.read_samples(run.folder.samples_of(evaluation)):
            parts.append(samples.as_html(evaluation, said))
    note = "The best, the worst and random episodes; all that were kept are in evaluations/*.samples.jsonl."
    return _section("Samples", note, "".join(parts)) if parts else ""


def _videos(run: Run) -> str:
    films = run.folder.films()
    if not films:
        reason = run.unavailable.get("reason")
        asked = any(stage.get("word") == "evaluate" for stage in run.stages)
        text = f"No videos: {escape(str(reason))} {INSTALL_GL}" if reason else "This run filmed no episode."
        return _section("Videos", text, "") if reason or asked else ""
    figures_html = []
    for path in films:
        about = run.about(path)
        outcome = {True: "Success", False: "Failure"}.get(about.get("success"), path.stem)  # type: ignore[arg-type]
        caption = f"{outcome}, initial state {about['seed']}" if "seed" in about else outcome
        source = video.data_url(path)
        player = f'<video src="{source}" controls autoplay loop muted playsinline></video>'
        if path.suffix == ".gif":
            player = f'<img class="film" alt="{escape(caption)}" src="{source}">'
        figures_html.append(f"<figure>{player}<figcaption>{escape(caption)}</figcaption></figure>")
    return _section("Videos", "", f'<div class="columns">{"".join(figures_html)}</div>')


def _stages(run: Run) -> str:
    if not run.stages:
        return ""
    amounts = ("decisions", "updates", "seconds")

    def row(first: str, title: str, values: dict[str, Any], last: str) -> str:
        counts = [f"{values.get(name) or 0:,}" for name in amounts[:2]]
        numbers = [*("" if count == "0" else count for count in counts), f"{values.get('seconds') or 0:.1f}"]
        return f"<tr><td>{first}</td><td>{escape(title)}</td>{_cells(numbers, 'td')}<td>{escape(last)}</td></tr>"

    rows = [
        row(
            ".".join(str(i + 1) for i in stage.get("path", [])),
            str(stage.get("title") or stage.get("word")),
            stage,
            describe(stage.get("metrics") or {}),
        )
        for stage in run.stages
    ]
    head = f"<tr><th></th><th>stage</th>{_cells(amounts, 'th')}<th></th></tr>"
    foot = row("", "all stages", _totals(run), "")
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table>"
    return _section("Stages", "", f'<div class="scroll">{table}</div>')


def _damaged(run: Run) -> str:
    if not run.damaged:
        return ""
    note = "These files of the run folder cannot be read; what they held is missing above."
    return _section("Damaged files", note, f"<pre>{escape(chr(10).join(run.damaged))}</pre>")


def _cells(texts: Sequence[str], tag: str) -> str:
    return "".join(f'<{tag} class="n">{escape(text)}</{tag}>' for text in texts)


def _recipe(run: Run) -> str:
    note = "Fully resolved, defaults included: this text alone is the run."
    return _section("Recipe", note, _folded(run.folder.recipe, run.recipe_text))


def _folded(path: Path, text: str) -> str:
    """A file that opens at a click; nothing where it is empty."""
    return f"<details><summary>{path.name}</summary><pre>{escape(text)}</pre></details>" if text else ""


def _facts(run: Run) -> str:
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
    rows = {
        "command": facts.get("command"), "commit": facts.get("commit"), "started": facts.get("started"),
        "seeds": "; ".join(seeds), "machine": f"{facts.get('processor', '?')}, {cores}", "system": facts.get("system"),
        "versions": versions, "memory": memory,
    }  # fmt: skip
    cells = "".join(f'<tr><td class="key">{k}</td><td>{escape(str(v))}</td></tr>' for k, v in rows.items() if v)
    log = _folded(run.folder.messages, run.messages)
    return _section("How to repeat this", "", f"<table><tbody>{cells}</tbody></table>{log}")
