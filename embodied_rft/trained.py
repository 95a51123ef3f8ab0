"""A run opened to be used: `load_policy` for one's own loop, the session behind `erft eval` and `erft play`.

Only reads, so it may be done while the run is being trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from embodied_rft import inputs, resume
from embodied_rft.checkpoint import BEST, Checkpoints, load
from embodied_rft.config import recipe_difference, recipe_of
from embodied_rft.log import LogConfig
from embodied_rft.session import Session

Which = Literal["newest", "best"]


def read_state(folder: Path, which: Which = "newest") -> dict[str, Any]:
    """The state in a checkpoint of a run.

    Raises:
        ValueError: there is no run, or no such checkpoint, in the folder; or its recipe.yaml is another one.
    """
    root = folder / "checkpoints"
    if not root.is_dir():
        raise ValueError(f"{folder} holds no run: there are no checkpoints in it. Give the folder of `erft train`.")
    if which == "best":
        if not (root / BEST).is_dir():
            raise ValueError(f"{folder} has no best checkpoint: its recipe draws no learning curve (evaluate_every)")
        state = load(root / BEST)
    else:
        newest = Checkpoints(root, holds=resume.HOLDS).newest()
        if newest is None:
            raise ValueError(f"{folder} holds no checkpoint yet; train it first")
        state = newest[1]
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        difference = recipe_difference(state["recipe"], recipe.read_text(encoding="utf-8", errors="replace"))
        if difference:
            raise ValueError(
                f"{recipe} is not the recipe that was trained ({'; '.join(difference[:6])}): undo the change, or "
                "remove the file; the checkpoint holds the right one"
            )
    return state


@contextmanager
def opened(folder: str | Path, which: Which = "newest") -> Iterator[Session]:
    """A session with the policy of a run, and an empty folder of its own that is removed at the end.

    Its training pool holds one environment.
    """
    folder = Path(folder).absolute()
    state = read_state(folder, which)
    recipe = recipe_of(state["recipe"], folder)
    for path, digest in recipe.inputs.items():
        if Path(path).exists() and inputs.hash_of(Path(path)) != digest:
            raise ValueError(f"{path} is not what it was when the run in {folder} read it")
    env = replace(recipe.env, num_envs=1, num_workers=None, evaluation_envs=None)
    silent = LogConfig(console=False, csv=False)
    with tempfile.TemporaryDirectory(prefix="erft-") as scratch:
        session = Session(replace(recipe, env=env, logging=silent), Path(scratch), quiet=True, text=state["recipe"])
        try:
            resume.load_weights(session, state)
            averaged = (state["learner"] or {}).get("averaged")
            if averaged is not None:  # who only looks sees what evaluations see
                session.agent.policy.load_state_dict(averaged)
            session.env = replace(recipe.env, options=session.env.options)
            yield session
        finally:
            session.close()
