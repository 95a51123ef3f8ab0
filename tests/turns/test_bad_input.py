"""Bad input in conversations, each through a run: counted turns or a clear error, and nothing else is lost.

Answers that are empty, endless, unreadable, in another language, full of the template's tokens; pictures that end
early; servers that die in the middle of an episode; templates that merge turns.
"""

import json
from collections import Counter

import gymnasium
import numpy as np
import pytest
import torch

import embodied_rft.envs  # noqa: F401
from embodied_rft.agents.language import LanguagePolicy
from embodied_rft.agents.models.tiny_lm import ASSISTANT, USER
from embodied_rft.data import CUT, PAST, Decisions, Ragged
from embodied_rft.learning.agent import build_agent
from embodied_rft.options import parse
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.registry import register
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train
from embodied_rft.turns.parsing import make_parser
from tests.lab.draws import generator
from tests.lab.picture_talk import PictureTalk
from tests.pools.test_infrastructure import LENGTH, TROUBLED

LONGEST, TURNS = 32, 4
SAID = {  # what is said: how it is counted; None: understood
    "": "empty",
    " \n\t": "empty",
    "<answer>right right right right right right": "cut",
    "\x00\ufffd{[<<": "no_answer",
    "右に行きます": "no_answer",
    "<answer>вправо</answer>": "unknown_word",
    f"{USER}right{ASSISTANT}left": "no_answer",
    f"<answer>{ASSISTANT}right</answer>": None,  # a model may draw any token: the environment reads the text alone
    "<answer>left</answer>": None,
}


@register("agent", "babbling")
class Babbling(LanguagePolicy):
    """`language` that says one thing of `SAID` after the other, with the probabilities that they have."""

    def act(self, observation, *, greedy=False, rng=None):
        count = len(observation[self.key])
        turn = observation[PAST].index.lengths
        ids = [self.ids((7 * row + int(turn[row])) % len(SAID)) for row in range(count)]
        trace = {"reply": Ragged.of(ids, np.int64), CUT: np.array([i[-1] != self.dialogue.end for i in ids])}
        texts = [self.reply_text(i) for i in ids]
        with torch.no_grad():
            log_prob, _ = self.log_prob(observation, texts, trace)
        rows = [log_prob[row, : len(i)].numpy() for row, i in enumerate(ids)]
        return Decisions(texts, Ragged.of(rows), trace)

    def ids(self, number):
        """With special tokens where they are named, and an end where there is room."""
        ids = self.tokenizer(list(SAID)[number], add_special_tokens=False)["input_ids"]
        return np.array([*ids, self.dialogue.end][:LONGEST])


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder, agent, env, *stages, model=None):
    model = model or {"tiny": {"hidden_size": 32, "num_layers": 1}}
    agent = {"model": model, "key": "message", **agent}
    tree = {"env": {"num_envs": 8, **env}, "agent": agent, "stages": list(stages), "threads": 1}
    return train(parse(Recipe, {**tree, "buffer": {"capacity": 1_000}}), folder, quiet=True, report=False)


def test_bad_answers_are_turns_that_are_counted_paid_and_learned_from(tmp_path):
    env = {
        "id": "embodied_rft/ToldNumberLine-v0",
        "options": {"parser": "tags", "invalid": -0.5, "turns": TURNS, "style": "short"},
    }
    learn = {"finetune": {"objective": {"id": "ppo", "num_epochs": 1, "batch_size": 1_000}, "decisions": 128}}
    learn["finetune"]["episodes_per_iteration"] = 32
    session = run(tmp_path, {"id": "babbling", "max_new_tokens": LONGEST}, env, learn, {"evaluate": {"episodes": 16}})
    parser = make_parser("tags", words=(("left", "right"),))
    expected, turns = Counter(), 0
    for each in session.buffer.trajectories():
        kinds = [parser.parse(said).invalid for said in each.action]
        expected.update(filter(None, kinds))
        turns += len(kinds)
        paid = each.reward if each.end == "truncated" else each.reward[:-1]  # the end of a game pays, too
        assert ((paid == -0.5) == [kind is not None for kind in kinds[: len(paid)]]).all()
    assert set(expected) == set(filter(None, SAID.values())) and turns == session.counters["decisions"]
    collected = [line for line in lines_of(tmp_path) if "collect/episodes" in line]
    for kind in expected:
        counts = [line[f"collect/invalid/{kind}"] * line["collect/episodes"] for line in collected]
        assert sum(counts) == pytest.approx(expected[kind]), kind
    assert all(abs(line["policy/kl"]) < 1e-5 for line in collected)  # what was drawn is what is scored
    judged = json.loads(next((tmp_path / "evaluations").glob("*.json")).read_text())
    for kind, count in judged["said"]["invalid"].items():
        assert judged["statistics"][f"invalid/{kind}"] == pytest.approx(count / judged["episodes"])
    last = next(line for line in lines_of(tmp_path) if "evaluate/success" in line)
    assert last["evaluate/invalid/empty"] == judged["statistics"]["invalid/empty"] > 0


class Torn(PictureTalk):
    """One in three episodes shows a picture whose lower half is missing, once."""

    def step(self, action):
        seen, *rest = super().step(action)
        if self.turn == 1 and self.shade % 3 == 0:
            seen["image"] = seen["image"][:16]
        return seen, *rest


gymnasium.register("toy/Torn-v0", Torn)


def test_a_truncated_picture_costs_its_episode_and_is_named(tmp_path):
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vision_size": 16}
    agent = {"id": "language", "max_new_tokens": 3, "prompt": "plain"}
    learn = {"finetune": {"objective": {"id": "ppo"}, "decisions": 72, "episodes_per_iteration": 24}}
    session = run(tmp_path, agent, {"id": "toy/Torn-v0"}, learn, model={"tiny_vlm": sizes})
    whole = list(session.buffer.trajectories())
    assert len(whole) == 24 and {len(each) for each in whole} == {3}
    assert {np.shape(each.observation["image"])[-3:] for each in whole} == {(32, 32, 3)}
    line = next(line for line in lines_of(tmp_path) if "collect/episodes" in line)
    assert line["incidents/error"] == line["collect/invalid_episodes"] > 0 and line["collect/episodes"] == 24
    latest = json.loads((tmp_path / "incidents.json").read_text())["latest"][-1]
    assert (
        "observation 'image' is an array uint8 (16, 32, 3); the observation space promises uint8 (32, 32, 3)" in latest
    )


@pytest.mark.parametrize("by", ["process", "socket"])
def test_a_server_that_dies_in_the_middle_costs_its_conversation_alone(by, tmp_path):
    TROUBLED.clear()
    env = {"id": "embodied_rft/Told-v0", "options": {"of": "served/Single-v0", "options": {"by": by}, "instead": "0"}}
    agent = {"id": "language", "max_new_tokens": 3, "prompt": "plain"}
    learn = {"finetune": {"objective": {"id": "ppo", "num_epochs": 1, "batch_size": 1_000}, "decisions": 128}}
    learn["finetune"]["episodes_per_iteration"] = 32
    session = run(tmp_path, agent, env, learn, {"evaluate": {"episodes": 20}})
    whole = list(session.buffer.trajectories())
    assert len(whole) == 32 and {len(each) for each in whole} == {LENGTH}
    collected, judged = (
        next(line for line in lines_of(tmp_path) if name in line) for name in ("collect/episodes", "evaluate/success")
    )
    assert collected["incidents/infrastructure/dead_server"] == collected["collect/invalid_episodes"] > 0
    assert abs(collected["policy/kl"]) < 1e-5  # nothing of a void conversation is read in the next one
    assert judged["incidents/infrastructure/dead_server"] > 0 and "evaluate/left_out" not in judged


def test_a_template_that_merges_turns_is_refused_with_the_reason(tmp_path):
    space = gymnasium.spaces.Dict({"message": AnyText(99)})
    agent = build_agent({"id": "language", "model": {"tiny": {"hidden_size": 32}}}, space, AnyText(99), generator())
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}<|assistant|>"
    agent.policy.tokenizer.chat_template = users
    agent.policy.save_pretrained(tmp_path / "model")
    env = {"id": "embodied_rft/ToldNumberLine-v0", "options": {"turns": TURNS}}
    babbles = {"id": "language", "max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"earlier turns change, or are merged.*Use prompt .plain., or mend"):
        run(tmp_path / "run", babbles, env, {"collect": {"episodes": 8}}, model=str(tmp_path / "model"))
    plain = run(
        tmp_path / "other",
        {**babbles, "prompt": "plain"},
        env,
        {"collect": {"episodes": 8}},
        model=str(tmp_path / "model"),
    )
    assert plain.counters["decisions"] == 8 * TURNS
