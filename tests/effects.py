"""How many options act, are refused, or do nothing, of everything that is registered: `python -m tests.effects`."""

import tempfile
from collections import defaultdict
from pathlib import Path

from tests import (
    test_effects,
    test_effects_of_agents,
    test_effects_of_models,
    test_effects_of_stages,
    test_effects_of_tasks,
    test_effects_of_worlds,
)
from tests.lab.effects import Walk, tally


def walks(folder: Path) -> dict[str, list[Walk]]:
    """{kind: its walks}."""
    found = defaultdict(list)
    found["objective"] = test_effects.walks()
    found["agent"] = [*test_effects_of_agents.walks(), *sum(test_effects_of_models.walks(folder).values(), [])]
    of_tasks = [*test_effects_of_tasks.walks(folder), *test_effects_of_worlds.walks()]
    for walk in [*test_effects_of_stages.walks(folder), *of_tasks]:
        found[walk.what.partition(" ")[0]].append(walk)
    return dict(found)


def main() -> None:
    """One line a kind, and their sum; the names of those that do nothing."""
    counts, dead = [], []
    with tempfile.TemporaryDirectory() as folder:
        for kind, some in walks(Path(folder)).items():
            found = tally(some)
            counts.append((kind, found["walked"], found["effect"], found["refused"], len(found["exempt"])))
            dead += found["dead"]
            print(f"{kind:10} {describe(*counts[-1][1:])}", flush=True)
    print(f"{'all':10} {describe(*(sum(column) for column in zip(*(row[1:] for row in counts), strict=True)))}")
    print("without effect:", ", ".join(dead) or "none")


def describe(walked: int, effect: int, refused: int, exempt: int) -> str:
    """The counts as words."""
    return (
        f"{walked:5} walked: {effect:4} act, {refused:4} are refused alone, {exempt:2} change no result and should not"
    )


if __name__ == "__main__":
    main()
