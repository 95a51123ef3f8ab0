"""Runs the policy of a run folder in its environment, for people to look at: in a window, else as videos."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from embodied_rft.evaluation.film import roll_out
from embodied_rft.evaluation.video import write_video
from embodied_rft.names import UserError
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.resume import Which
from embodied_rft.runs.trained import opened
from embodied_rft.seeding import evaluation_generator, evaluation_seed


def play(
    folder: str | Path,
    *,
    episodes: int = 1,
    sheet: int = 0,
    checkpoint: Which = "newest",
    device: str = "auto",
    trust: bool = False,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Greedy episodes on held-out initial states; the return of each.

    They are shown in a window where there is a display, else written to `play/` in the run folder; an environment that
    cannot be drawn is played all the same.

    Args:
        folder: of the run.
        episodes: how many.
        sheet: which list of initial states.
        checkpoint: "newest", or "best" on the learning curve.
        device: where the policy computes.
        trust: code that the run brings along may run: plug-ins in its folder, classes, pickles.
        say: called with one line for each episode.
    """
    if episodes < 1:
        raise UserError(f"episodes is {episodes}; expected at least 1")
    returns: list[float] = []
    with opened(folder, checkpoint, device=device, trust=trust) as session:
        act = session.actor(greedy=True, rng=evaluation_generator(sheet=sheet))
        window = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        mode: str | None = "human" if window else "rgb_array"
        for index in range(episodes):
            seed, shown = evaluation_seed(index, sheet=sheet), ""
            try:
                rolled = roll_out(act, session.env, seed, session.agent.policy, render_mode=mode)
                if len(rolled.frames):
                    shown = f"  {write_video(RunFolder(folder).played / f'{sheet}-{index}.mp4', rolled.frames)}"
            except Exception as error:
                if mode is None:
                    raise
                mode, shown = None, f"  not drawn: {error}"  # no display, no GL: the policy can be played all the same
                rolled = roll_out(act, session.env, seed, session.agent.policy, render_mode=mode)
            returns.append(rolled.total)
            outcome = f"  {'success' if rolled.success else 'failure'}" if rolled.told else ""
            say(f"initial state {seed}  return {rolled.total:.4g}{outcome}{shown}")
    return returns
