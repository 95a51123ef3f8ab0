"""What was said in an evaluation: kept, bounded, the best, worst and random ones shown, escaped wherever that is."""

import json

import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.data import Decisions
from embodied_rft.evaluation import samples
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.names import visible
from embodied_rft.options import parse
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.text_spaces import write_chat
from embodied_rft.report.figures import part
from embodied_rft.runs.log import LogConfig, Logger
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.sinks import Sink
from embodied_rft.train import train

NASTY = "<script>alert(1)</script> | [/red] `code` \x1b[31m\u202e =cmd"


def sample(number, reply="r", prompt="p", turns=1):
    said = [{"prompt": prompt, "reply": reply, "reward": float(number)}] * turns
    return {"seed": number, "return": float(number), "success": number > 5, "turns": said}


def test_best_worst_and_random_ones_are_picked_once_each_and_again_the_same():
    every = [sample(i) for i in np.random.default_rng(0).permutation(50).tolist()]
    picked = samples.pick(every)
    assert [s["seed"] for s in picked["best"]] == [49, 48, 47] and [s["seed"] for s in picked["worst"]] == [0, 1, 2]
    seeds = [s["seed"] for some in picked.values() for s in some]
    assert len(set(seeds)) == 9 and picked == samples.pick(every)
    few = samples.pick([sample(1), sample(2)])
    assert [len(few[kind]) for kind in ("best", "worst", "random")] == [1, 1, 0]
    assert samples.pick([]) == {"best": [], "worst": [], "random": []}


def test_files_are_bounded_and_read_back(tmp_path):
    path = tmp_path / "a.samples.jsonl"
    every = [sample(i, reply="x" * 30_000, turns=30) for i in range(300)]
    samples.write_samples(path, every)
    read = samples.read_samples(path)
    assert path.stat().st_size <= samples.MOST_BYTES and 9 < len(read) < 300
    assert {s["seed"] for s in read} >= {0, 1, 2, 297, 298, 299}  # the telling ones are kept
    assert len(read[0]["turns"]) == samples.MOST_TURNS and read[0]["turns_left_out"] == 20
    assert len(read[0]["turns"][0]["reply"]) < samples.MOST_CHARACTERS + 50
    assert "[... 26,000 characters ...]" in read[0]["turns"][0]["reply"]
    with open(path, "ab") as file:
        file.write(b'{"seed": 1, "return"\n[]\n{"seed": 1, "return": 0, "success": true, "turns": [7]}\n\xff\n')
    assert samples.read_samples(path) == read  # damaged lines are left out
    samples.write_samples(path, [sample(1, reply="\ud800 lone surrogate")])
    assert len(samples.read_samples(path)) == 1
    assert samples.read_samples(tmp_path / "none") == []


def html(evaluation, some):
    return part("samples", samples.shown(evaluation, some))


def test_a_hack_is_seen_at_a_glance():
    hacked, others = [sample(1, reply="e" * 50)] * 90, [sample(0, reply=str(i)) for i in range(10)]
    said = samples.summarize(hacked + others)
    assert said == {"replies": 100, "distinct": 11, "commonest": "e" * 50, "times": 90}
    page = html({"name": "after", "said": said}, [sample(1, reply="e" * 50)])
    assert "100 replies, 11 of them different" in page and "90 times" in page and "e" * 50 in page


def test_nothing_that_was_said_leaves_its_cell():
    some = [sample(1, reply=NASTY, prompt=write_chat([{"role": "user", "content": NASTY}]))]
    counts = {"replies": 3, "distinct": 2, "times": 2}
    page = html({"name": NASTY, "said": {"commonest": NASTY, **counts}}, some)
    assert "3 replies, 2 of them different" in page
    for damaged in (None, [], {**counts, "times": NASTY}, {"commonest": NASTY}):  # counted again
        assert "1 replies, 1 of them different" in html({"said": damaged}, some)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page and "user: &lt;script" in page
    (row,) = samples.as_markdown(some).splitlines()[2:]
    assert "<script" not in row and "\x1b" not in row and row.count("|") == 5  # the borders of four columns
    assert visible("a\tb\nc\x07\u200b\x9b") == "a\tb\nc\\x07\\u200b\\x9b"


def say(observation):
    return Decisions([prompt[:1] for prompt in observation["prompt"]], None)


def test_an_evaluation_keeps_what_was_said_by_its_seed():
    pool = make_pool("embodied_rft/TextSum-v0", 7, purpose="evaluation")
    outcome = evaluate(say, pool, evaluation_seeds(30))
    assert [s["seed"] for s in outcome.samples] == outcome.seeds
    for one, returned, won in zip(outcome.samples, outcome.returns, outcome.results, strict=True):
        (turn,) = one["turns"]
        shown = pool.reset(np.full(7, one["seed"]))["prompt"][0]
        assert (turn["prompt"], turn["reply"], turn["reward"]) == (shown, shown[:1], returned)
        assert one["return"] == returned and one["success"] == won
    content = outcome.to_json()
    assert "samples" not in content and content["said"]["replies"] == 30
    pool.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_shows_samples_in_file_report_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{NASTY} {i}", "answer": "b"}) + "\n" for i in range(30)))
    tree = {
        "env": {"id": "embodied_rft/TextJsonl-v0", "num_envs": 4, "options": {"path": str(path), "held_out": 0.5}},
        "agent": {"id": "language", "model": {"tiny": {"hidden_size": 32}}, "max_new_tokens": 3, "prompt": "plain"},
        "buffer": {"capacity": 100},
        "threads": 1,
        "logging": {"tensorboard": True},
        "stages": [{"evaluate": {"name": f"first {NASTY}", "episodes": 12}}, {"evaluate": {"episodes": 12}}],
    }
    run = tmp_path / "run"
    train(parse(Recipe, tree), run, quiet=True)
    content = json.loads((run / "evaluations" / "0-0.json").read_text())
    said = samples.read_samples(run / "evaluations" / content["samples"])
    assert len(said) == content["episodes"] > 5 and NASTY in said[0]["turns"][0]["prompt"]
    page = (run / "report.html").read_text()
    assert page.count("replies, ") == 2 and "<h2>Samples</h2>" in page
    assert "alert(1)" in page and "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert any(tag.startswith("samples/first") for tag in tags) and "recipe/text_summary" in tags
    (shown,) = events.Tensors(next(tag for tag in tags if tag.startswith("samples/policy")))
    assert b"alert(1)" in shown.tensor_proto.string_val[0] and b"<script" not in shown.tensor_proto.string_val[0]


def test_names_of_evaluations_lead_nowhere(tmp_path):
    """Weights & Biases makes files of them."""
    seen = []

    class Shown(Sink):
        def write(self, step, record):
            pass

        def close(self):
            pass

        def show_samples(self, name, samples, decisions):
            seen.append((name, len(samples), decisions))

    logger = Logger(tmp_path, LogConfig(csv=False), quiet=True)
    logger._open()
    logger._sinks = [Shown()]
    for name in ("after", "../../x", "/etc/x", "[/red]\x1b", "..", ""):
        logger.show_samples(name, [sample(1)], decisions=7)
    names = ["after", "_.._x", "_etc_x", "__red__", "policy", "policy"]
    assert seen == [(name, 1, 7) for name in names]
