"""The command `erft`: train, eval, play, demos, report, show, list, doctor. Parses and prints; others do the work.

A mistake of the user (`UserError`) is one message on stderr and exit code 2; Ctrl-C is a clean stop and 130; anything
else shows its traceback, ends with 1, and says so where it is ours to mend. Everything heavy is imported by the verb
that needs it, so that help answers at once.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from embodied_rft.files import PACKAGE
from embodied_rft.names import UserError, nearest, visible

USER, BROKEN, STOPPED = 2, 1, 130  # exit codes
BUG = "This is a bug of ours, not a mistake of yours: please report it, with these lines and what `erft doctor` prints."

TAKE_VALUE = ("--run", "--seed", "--out", "--episodes", "--noise", "--device")  # options of the verbs below
TAKE_PAIRS = ("train", "demos")  # verbs that take KEY=VALUE
LISTED = (
    "recipes",
    "stages",
    "agents",
    "objectives",
    "envs",
    "demonstrators",
    "rewards",
    "parsers",
    "credits",
    "shapings",
    "curriculums",
)


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE")] = (),
    *,
    run: Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> None:
    """Run a recipe, or continue it where it was stopped.

    Args:
        recipe: A YAML file, or the name of a shipped recipe (`erft list recipes`).
        overrides: Dotted changes, as in env.num_envs=8 stages.2.finetune.updates=100.
        run: Folder of the run; the same folder continues. Default: runs/NAME, with the seed if one is given.
        seed: Seed of everything; the same as seed=N.
        device: Where it computes: auto, cpu, cuda, cuda:1; the same as device=WORD.
        quiet: Say nothing but where the report is.
    """
    from embodied_rft import distributed
    from embodied_rft.report.page import write_report
    from embodied_rft.runs.facts import write_run_facts
    from embodied_rft.runs.recipe import load_recipe
    from embodied_rft.train import train as train_recipe

    changes = [*overrides, *([] if seed is None else [f"seed={seed}"])]
    changes += [] if device is None else [f"device={device}"]
    loaded = load_recipe(recipe, changes)
    named = run or Path("runs") / (loaded.name if seed is None else f"{loaded.name}-seed{seed}")
    folder = named.absolute()  # an environment may change the current folder
    with distributed.joined():
        first = distributed.rank() == 0
        if first:
            write_run_facts(folder, ["erft", "train", recipe, *changes, "--run", str(named)])
        train_recipe(loaded, folder, quiet=quiet, report=False)
    if first:
        print(f"report: {named / write_report(folder).name}")


def evaluate(
    run: Annotated[Positional[Path], arg(metavar="RUN_FOLDER")],
    *,
    episodes: int = 200,
    sheet: int = 0,
    env: str | None = None,
    official: bool = False,
    best: bool = False,
    device: str = "auto",
    trust: bool = False,
) -> None:
    """Measure a run's policy on held-out initial states.

    Args:
        run: Folder of the run.
        episodes: How many initial states.
        sheet: Which list of initial states; 0 is the report's.
        env: Another environment id with the same spaces.
        official: The environment that this one reproduces, as its authors ship it.
        best: The best policy of the learning curve instead of the newest.
        device: Where it computes: auto, cpu, cuda, cuda:1.
        trust: Run the code that the run brings along (plug-ins in its folder, classes, pickles).
    """
    from embodied_rft.report.page import write_report
    from embodied_rft.runs.judge import evaluate_run

    where: dict[str, Any] = {"checkpoint": "best" if best else "newest", "device": device, "trust": trust}
    print(evaluate_run(run, episodes=episodes, sheet=sheet, env=env, official=official, **where))
    print(f"report: {write_report(run)}")


def play(
    run: Annotated[Positional[Path], arg(metavar="RUN_FOLDER")],
    *,
    episodes: int = 1,
    sheet: int = 0,
    best: bool = False,
    device: str = "auto",
    trust: bool = False,
) -> None:
    """Watch a run's policy: in a window where there is a display, else as videos in the folder's play/.

    Args:
        run: Folder of the run.
        episodes: How many.
        sheet: Which list of initial states.
        best: The best policy of the learning curve instead of the newest.
        device: Where it computes: auto, cpu, cuda, cuda:1.
        trust: Run the code that the run brings along (plug-ins in its folder, classes, pickles).
    """
    from embodied_rft.runs.play import play as show

    where: dict[str, Any] = {"checkpoint": "best" if best else "newest", "device": device, "trust": trust}
    show(run, episodes=episodes, sheet=sheet, **where)


def demos(
    env: Annotated[Positional[str], arg(metavar="ENV_ID")],
    options: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE")] = (),
    *,
    out: Path,
    episodes: int = 100,
    noise: float = 0.0,
    seed: int = 0,
) -> None:
    """Write episodes of a scripted demonstrator to a file that the stage `load` reads.

    Args:
        env: Environment id (`erft list demonstrators`).
        options: Options of the environment, as in cameras=[front] image_size=64.
        out: The file to write.
        episodes: How many, failures included.
        noise: Standard deviation of Gaussian noise on the action, in action units.
        seed: Fixes initial states and noise.
    """
    from embodied_rft.experience.demonstrate import write_demos
    from embodied_rft.runs.console import describe
    from embodied_rft.runs.yaml_tree import parse_overrides

    given = parse_overrides(options)
    print(f"{out}: {describe(write_demos(env, out, episodes=episodes, noise=noise, seed=seed, options=given))}")


def report(run: Annotated[Positional[Path], arg(metavar="RUN_FOLDER")]) -> None:
    """Write report.html and summary.json of a run anew.

    Args:
        run: Folder of the run, finished or not.
    """
    from embodied_rft.report.page import write_report

    print(f"report: {write_report(run)}")


def show(
    run: Annotated[Positional[Path], arg(metavar="RUN_FOLDER")],
    *,
    episode: int | None = None,
    evaluation: str | None = None,
) -> None:
    """Read what an agent that writes text said while it was judged: one episode, or a list of what there is.

    Args:
        run: Folder of the run, finished or not.
        episode: Number of the episode in the evaluation.
        evaluation: Name of the evaluation, as the list shows it. Default: the latest verdict.
    """
    from embodied_rft.report.terminal import show as show_run

    show_run(run, number=episode, evaluation=evaluation)


def list_known(
    kind: Annotated[Positional[str], arg(metavar="KIND")] = "all",
    id: Annotated[Positional[str | None], arg(metavar="ID")] = None,
) -> None:
    """Show what can be named in a recipe, with one line each, or all options of one of them.

    Args:
        kind: recipes, stages, agents, objectives, envs, demonstrators, rewards, parsers, credits, shapings,
            curriculums; default all. Or recipe, env, buffer, learner, logging: the options of that part of a recipe.
        id: One of the kind, as in `erft list objective sac`: its options, with meaning, default and range.
    """
    from embodied_rft.runs.listing import print_known, print_options

    if kind == "all" or (id is None and kind in LISTED):
        print_known(LISTED if kind == "all" else (kind,))
    else:
        print_options(kind, id)


def doctor() -> int:
    """Check this machine and installation."""
    from embodied_rft.doctor import doctor as examine

    return examine()


def unquittable(verb: Callable[..., int | None]) -> Callable[..., int | None]:
    """The verb, in which `sys.exit` of something that it runs is an error: exit code 0 means that the work is done."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> int | None:
        try:
            return verb(*arguments, **options)
        except SystemExit as stop:
            raise UserError(
                f"a plug-in, a model or an environment called sys.exit({stop.code!r}); --debug shows where"
            ) from stop

    return run


VERBS: dict[str, Callable[..., int | None]] = {
    "train": train, "eval": evaluate, "play": play, "demos": demos, "report": report, "show": show,
    "list": list_known, "doctor": doctor,
}  # fmt: skip
VERBS = {name: unquittable(verb) for name, verb in VERBS.items()}

DESCRIPTION = """Makes robot and agent policies reliable with reinforcement learning.

`erft VERB --help` explains a verb; `--debug` with any verb shows where an error came from."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command; always ends with SystemExit."""
    for stream in (sys.stdout, sys.stderr):  # names in any language, whatever the locale can show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    code = _run(given, debug=debug)
    if "WORLD_SIZE" in os.environ:  # of a launcher of several processes
        from embodied_rft import distributed

        distributed.leave(code)
    sys.exit(code)


def _run(given: list[str], *, debug: bool) -> int:
    if given and not given[0].startswith("-") and given[0] not in VERBS:
        return _fail(f"unknown verb {given[0]!r}; {nearest(given[0], VERBS)}")
    if given and given[0] in TAKE_PAIRS:
        given = _overrides_first(given)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="erft", description=DESCRIPTION, args=given or ["--help"]
        )
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "stopped at once")
        print(f"continue with the same command: {shlex.join(['erft', *given])}", file=sys.stderr)
        return STOPPED
    except Exception as error:
        users = _is_users(error)
        if users and not debug:
            return _fail(str(error))
        if not users and _is_ours(error):
            error.add_note(BUG)
        raise
    return code if isinstance(code, int) else 0


def _overrides_first(given: list[str]) -> list[str]:
    """KEY=VALUE may stand anywhere on the line; the parser wants them together, after RECIPE or ENV_ID."""
    movable = [
        i for i, word in enumerate(given) if re.match(r"[A-Za-z_][\w.]*=", word) and given[i - 1] not in TAKE_VALUE
    ]
    rest = [word for i, word in enumerate(given) if i not in movable]
    first = next(
        (i for i, word in enumerate(rest) if i and not word.startswith("-") and rest[i - 1] not in TAKE_VALUE), 0
    )
    return [*rest[: first + 1], *(given[i] for i in movable), *rest[first + 1 :]]


def _is_users(error: Exception) -> bool:
    """Whether the message alone tells the user what to do; of a plug-in every ValueError counts as one that does."""
    return isinstance(error, (UserError, OSError)) or (isinstance(error, ValueError) and not _is_ours(error))


def _is_ours(error: Exception) -> bool:
    """Whether the innermost code that is neither a library's nor Python's own is ours, not a plug-in's."""
    ours = (PACKAGE, *(PACKAGE.parent / room for room in ("envs", "agents")))
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        file = Path(frame.f_code.co_filename)
        if any(file.resolve().is_relative_to(folder) for folder in ours):
            return True
        if file.is_absolute() and not any(file.resolve().is_relative_to(folder) for folder in installed):
            return False
    return True


def _fail(message: str) -> int:
    print(f"erft: {visible(message)}", file=sys.stderr)
    return USER


if __name__ == "__main__":
    main()
