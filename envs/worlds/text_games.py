"""TextWorld (Cote et al. 2018, arXiv:1806.11532): text games that are generated and compiled here, without a download.

A game is named by a number and the options. Training and evaluation never show the same one: games are told apart by
a hash of their facts and their solution, half of all hashes are held out, and numbers whose game is on the wrong side
are passed over. Compiling takes seconds, so games are kept in a folder of files by those options and the number, which
processes share. A turn is a text: {"message": what is new}; a command is a text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rft.envs.games.batch import Description
from embodied_rft.envs.worlds.world import Follower, World, need
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.registry import register
from embodied_rft.seeding import FIRST_EVALUATION_SEED, held_out_index

LONGEST = 10_000  # characters of a message, and of a command
REWARDS = ("score", "progress")
OF_THE_EMULATOR = {"quit", "q", "restart", "restore", "save", "undo", "script", "transcript", "verify", "version"}
IDLE = {"look", "inventory", "examine"}  # first words of commands that change nothing
NOTHING = "look"  # a command that changes nothing
RULES = (
    "You play a text game. Each turn you write one command, such as: look, inventory, examine box, take key from box, "
    "unlock door with key, open door, insert key into box, put key on table, drop key, eat apple, go north."
)


class TextGame(World[str]):
    """A text game of rooms, things and a quest, of the package textworld.

    Args:
        rooms: how many.
        objects: how many things there are at least, those of the quest among them.
        quest_length: commands that the quest takes.
        games: how many games training shows.
        held_out: how many games evaluation shows, which training never does.
        length: decisions of an episode.
        admissible: whether messages end with all commands that do something now.
        reward: "score" (1 when the quest is done) or "progress" (1 for each command that brings the end nearer, -1 for
            one that takes it further away).
        expert: whether the observation holds a command that leads on, key "expert".
        folder: where compiled games are kept; None: a folder of the user's among the temporary files.
        render_mode: None or "ansi".
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        *,
        rooms: int = 2,
        objects: int = 4,
        quest_length: int = 2,
        games: int = 100,
        held_out: int = 100,
        length: int = 50,
        admissible: bool = True,
        reward: str = "score",
        expert: bool = False,
        folder: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        need("textworld", "textworld")
        counts = {"rooms": rooms, "objects": objects, "quest_length": quest_length, "games": games}
        for name, count in {**counts, "held_out": held_out, "length": length}.items():
            if count < 1:
                raise UserError(f"{name} is {count}; expected at least 1")
        if reward not in REWARDS:
            raise UserError(f"unknown reward {reward!r}; {nearest(reward, REWARDS)}")
        self.family = {"rooms": rooms, "objects": objects, "quest_length": quest_length}
        self.games, self.num_held_out_states, self.length = games, held_out, length
        self.admissible, self.reward = admissible, reward
        self.folder = Path(folder) if folder is not None else _own_folder()
        self.inner: Any = None
        shown, taken = AnyText(LONGEST), AnyText(LONGEST)
        super().__init__({"message": shown}, taken, expert=expert, render_mode=render_mode)

    def choose(self, seed: int | None) -> int:
        """A game: an even number is one of training, an odd one is held out."""
        if seed is not None and seed >= FIRST_EVALUATION_SEED:
            return 2 * held_out_index(seed, self.num_held_out_states) + 1
        count = self.num_held_out_states if self.evaluates else self.games
        return 2 * int(self.np_random.integers(count)) + self.evaluates

    def begin(self, start: int) -> None:
        """The first room of a game."""
        import textworld

        path = prepare(self.folder, start, **self.family)
        if self.inner is not None:
            self.inner.close()
        asked = dict.fromkeys(["admissible_commands", "won", "lost", "objective", "description"], True)
        asked |= {"game": True, "policy_commands": self.expert, "intermediate_reward": self.reward == "progress"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the emulator knows no score of this game, which is told otherwise
            self.inner = textworld.start(str(path), textworld.EnvInfos(feedback=True, **asked))
            self.now = self.inner.reset()
        self.steps, self.score, self.wasted = 0, 0, 0
        self.news, self.end = _clean(self.now.description), self.now.game.metadata["walkthrough"][-1]

    def advance(self, action: str) -> tuple[float, bool, bool, dict[str, Any]]:
        """One command; info counts those that were not admissible."""
        command = " ".join(action.encode("ascii", "ignore").decode().split())
        self.wasted += command.lower() not in {each.lower() for each in self.now.admissible_commands}
        self.steps += 1
        gained = 0.0
        if not command or command.split()[0].lower().strip(".,;") in OF_THE_EMULATOR or not command[0].isalnum():
            self.news = "That is no command of this game."
        else:
            self.now, score, _ = self.inner.step(command)
            gained = float(self.now.intermediate_reward if self.reward == "progress" else score - self.score)
            self.score, self.news = score, _clean(self.now.feedback)
        over = bool(self.now.won or self.now.lost)
        told = {"is_success": float(self.now.won), "invalid/moves": float(self.wasted)}
        return gained, over, not over and self.steps >= self.length, told

    def observe(self) -> dict[str, str]:
        """What is new; the rules and the quest with the first message."""
        head = f"{RULES}\n\n{self.now.objective.strip()}\n\n" if self.steps == 0 else ""
        listed = f"\nCommands: {', '.join(commands)}" if (commands := self._commands()) else ""
        return {"message": f"{head}{self.news}{listed}"[:LONGEST]}

    def describe(self) -> Description:
        """The quest, what is new, and all commands that do something now."""
        said = f"{self.now.objective.strip()}\n\n{self.news}"
        return Description(RULES, said, (), self._commands())

    def brief(self) -> Description:
        """The last command of the quest, which is its end, and all commands that change something now."""
        changing = tuple(each for each in self._commands() if each.split()[0] not in IDLE)
        return Description(RULES, self.end, (), changing)

    def picture(self) -> None:
        """There is none."""

    def advise(self) -> str:
        """The next command of a solution from here; looks around where there is none any more."""
        return next(iter(self.now.policy_commands or ()), NOTHING)

    def close(self) -> None:
        """End the emulator."""
        if self.inner is not None:
            self.inner.close()
            self.inner = None

    def _commands(self) -> tuple[str, ...]:
        """All commands that do something now, where they are told."""
        return tuple(sorted(self.now.admissible_commands or ())) if self.admissible and not self.over else ()


def prepare(folder: Path, start: int, **family: int) -> Path:
    """The file of a compiled game, made if it is not there yet; of `start` the parity says whether it is held out."""
    import textworld
    from textworld.generator import compile_game

    named = json.dumps([textworld.__version__, start, family], sort_keys=True)
    name = hashlib.sha256(named.encode()).hexdigest()[:20]
    path = folder / f"{name}.z8"
    if path.exists():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    game, options = _draw(start, **family)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        options.path = str(Path(inside) / f"{name}.z8")
        compile_game(game, options)
        for made in (".json", ".z8"):  # others may be at it as well; what they move there is the same
            os.replace(Path(inside) / f"{name}{made}", folder / f"{name}{made}")
    return path


def _draw(start: int, *, rooms: int, objects: int, quest_length: int) -> tuple[Any, Any]:
    """The first game of a number that is on its side, and its options."""
    from textworld import GameOptions
    from textworld.generator import make_game

    for attempt in range(1000):
        options = GameOptions()
        options.kb = _knowledge()
        options.seeds = int(np.random.SeedSequence([start, attempt]).generate_state(1)[0])
        options.nb_rooms, options.nb_objects, options.quest_length = rooms, objects, quest_length
        game = make_game(options)
        if _is_held_out(game) == bool(start % 2):
            return game, options
    raise UserError(
        f"no game with {rooms} rooms, {objects} objects and a quest of {quest_length} is "
        f"{'held out' if start % 2 else 'left for training'} (1000 were drawn): ask for larger ones"
    )


def _is_held_out(game: Any) -> bool:
    """Whether only evaluation may show a game: half of them, by facts and solution."""
    content = json.dumps([sorted(map(str, game.world.facts)), game.metadata.get("walkthrough")])
    return hashlib.sha256(content.encode()).digest()[0] % 2 == 1


@functools.cache
def _knowledge() -> Any:
    from textworld.generator.data import KnowledgeBase

    return KnowledgeBase.load()


def _own_folder() -> Path:
    """Nobody else may put files there."""
    folder = Path(tempfile.gettempdir()) / f"embodied_rft-text_games-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(f"{folder} belongs to somebody else: set env.options.folder to a folder of your own")
    return folder


def _clean(feedback: str) -> str:
    """Without the prompt and the status line that end every answer, what the emulator asks at the end, empty lines."""
    text = re.sub(r"\n>[^\n]*$|\n\s*\*\*\* The End \*\*\*.*", "", feedback.strip("\n"), flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n", text).strip()


@register("demonstrator", "text_game_expert", "embodied_rft/TextGame-v0")
class Guide(Follower[str]):
    """The solution of TextWorld; the environment tells it (`env.options.expert: true`).

    Args:
        noise: share of commands that only look around, in [0, 1].
    """

    def other(self, rng: np.random.Generator) -> str:
        """Looks around, which costs a turn."""
        return NOTHING
