"""A server of the package openenv-core: `python -m tests.lab.open_env_server PORT FORM`. FORM: "text" or "json"."""

import os
import random
import sys
import time

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field


class Say(Action):
    """One text."""

    word: str = Field(description="a number from 0 to 9", max_length=40)


class Bet(Action):
    """Two fields."""

    word: str = Field(description="a number from 0 to 9")
    stake: int = Field(description="what is at stake", ge=1)


class Heard(Observation):
    """What was said, and whether it was right."""

    reply: str
    solved: bool = False


class Guess(Environment):
    """A number is to be guessed; some words are trouble."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.target = random.Random(seed).randrange(10)
        self.count = 0
        return Heard(reply=f"guess, {kwargs.get('who', 'you')}")

    def step(self, action, timeout_s=None, **kwargs):
        self.count += 1
        if action.word == "crash":
            os._exit(1)
        if action.word == "hang":
            time.sleep(3)
        if action.word == "raise":
            raise RuntimeError("the dice fell off the table")
        solved = action.word == str(self.target)
        reply = "right" if solved else f"not {action.word}"
        return Heard(reply=reply, solved=solved, done=solved, reward=getattr(action, "stake", 1) * float(solved))

    @property
    def state(self):
        return State(step_count=self.count)


if __name__ == "__main__":
    app = create_app(Guess, {"text": Say, "json": Bet}[sys.argv[2]], Heard, max_concurrent_envs=16)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="critical")
