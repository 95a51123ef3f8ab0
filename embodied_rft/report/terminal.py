"""`erft show`: one conversation of a run in the terminal, or a list of those that there are."""

from __future__ import annotations

import os

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from embodied_rft.report.conversations import Turn, chosen, conversation, episode, evaluations_of, samples_of, title
from embodied_rft.report.run import Run
from embodied_rft.runs.folder import RunFolder

LISTED = 40  # episodes
STYLES = {"thought": "italic dim", "said": "bold", "": ""}


def show(
    folder: str | os.PathLike[str],
    *,
    number: int | None = None,
    evaluation: str | None = None,
    console: Console | None = None,
) -> None:
    """Print one conversation; without `number`, what there is.

    Args:
        folder: of the run.
        number: of the episode in the evaluation, from 0.
        evaluation: its name as the list says it; None: the latest verdict.
        console: where it is printed.

    Raises:
        ValueError: no run, nothing was said in it, no such evaluation or episode.
    """
    run = Run.read(RunFolder(folder))
    console = console or Console(highlight=False, emoji=False)
    name, found = chosen(run, evaluation)
    kept = {sample.get("episode", i): sample for i, sample in enumerate(samples_of(run, found))}
    told = bool(found.get("told", True))
    if number is not None:
        one = conversation(episode(kept, number, name), told=told)
        console.print(Text(f"{name}, {one.title}", style="bold"))
        for place, turn in enumerate(one.turns):
            if one.left_out and place == one.middle:
                console.print(Text(f"... {one.left_out} turns are left out ...", style="dim"))
            after = one.left_out if place >= one.middle else 0
            _print(console, turn, place + after)
        return
    table = Table("evaluation", "decisions", "success" if told else "return", "replies", box=None)
    for key, each in evaluations_of(run).items():
        value = each["success"] if each.get("told", True) else each.get("mean_return", float("nan"))
        said = each.get("said")
        replies = str(said.get("replies", "")) if isinstance(said, dict) else ""
        table.add_row(Text(key), f"{each.get('decisions', 0):,}", f"{value:.3g}", Text(replies))
    console.print(table)
    console.print(Text(f"\n{name}: {len(kept)} episodes are kept", style="bold"))
    for key in sorted(kept)[:LISTED]:
        sample = kept[key]
        turns = len(sample["turns"]) + sample.get("turns_left_out", 0)
        console.print(Text(f"{key:>5}  {title({**sample, 'episode': key}, told=told)}, {turns} turns"))
    if len(kept) > LISTED:
        console.print(Text(f"  ...  and {len(kept) - LISTED} more"))
    console.print(Text("One of them: --episode N; of another evaluation: --evaluation NAME", style="dim"))


def _print(console: Console, turn: Turn, number: int) -> None:
    seen = f"  [{', '.join(key for key, _ in turn.pictures)}]" if turn.pictures else ""
    console.print(Panel(Text(turn.prompt), title=Text(f"turn {number}{seen}"), title_align="left", border_style="dim"))
    reply = Text()
    for kind, text in turn.reply:
        reply.append(text, style=STYLES[kind])
    outcome = f"reward {turn.reward:.4g}" + (f", invalid: {turn.wrong}" if turn.wrong else "")
    action = "" if turn.action is None else f"{turn.action}  "
    style = "red" if turn.wrong else "green"
    console.print(Panel(reply, title=Text(f"{action}{outcome}"), title_align="right", border_style=style))
