"""What was said in an evaluation: kept, bounded, the best, worst and random ones shown, escaped wherever that is."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from PIL import Image

import embodied_rft.envs  # noqa: F401
from embodied_rft.data import Decisions
from embodied_rft.evaluation import pictures, samples
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.names import visible
from embodied_rft.options import parse
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.text_spaces import write_chat
from embodied_rft.runs.log import LogConfig, Logger
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.sinks import Sink
from embodied_rft.train import train
from embodied_rft.turns.parsing import make_parser

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
    assert len(read[0]["turns"]) == samples.MOST_TURNS and read[0]["turns_left_out"] == 30 - samples.MOST_TURNS
    assert len(read[0]["turns"][0]["reply"]) < samples.MOST_CHARACTERS + 50
    assert "[... 26,000 characters ...]" in read[0]["turns"][0]["reply"]
    with open(path, "ab") as file:
        file.write(b'{"seed": 1, "return"\n[]\n{"seed": 1, "return": 0, "success": true, "turns": [7]}\n\xff\n')
    assert samples.read_samples(path) == read  # damaged lines are left out
    old = b'{"seed": 1, "return": 0.5, "success": true, "turns": [{"prompt": "p", "reply": "r", "reward": 0.5}]}\n'
    path.write_bytes(old)
    turn = {"prompt": "p", "reply": "r", "reward": 0.5}
    assert samples.read_samples(path) == [{"seed": 1, "return": 0.5, "success": True, "turns": [turn]}]
    samples.write_samples(path, [sample(1, reply="\ud800 lone surrogate")])
    assert len(samples.read_samples(path)) == 1
    assert samples.read_samples(tmp_path / "none") == []


def test_what_was_said_is_counted():
    hacked, others = [sample(1, reply="e" * 50)] * 90, [sample(0, reply=str(i)) for i in range(10)]
    said = samples.summarize(hacked + others)
    assert said == {"replies": 100, "distinct": 11, "commonest": "e" * 50, "times": 90}
    turns = [{"prompt": "", "reply": "x", "reward": 0.0, **more} for more in ({"invalid": "empty"}, {"cut": True}, {})]
    counted = samples.summarize([{"turns": turns}])
    assert counted["invalid"] == {"empty": 1} and counted["cut"] == 1
    assert [samples.wrong(turn) for turn in turns] == ["empty", "cut", ""]
    assert samples.wrong({"invalid": "cut", "cut": True}) == "cut"


def test_nothing_that_was_said_leaves_its_cell():
    some = [sample(1, reply=NASTY, prompt=write_chat([{"role": "user", "content": NASTY}]))]
    some[0]["turns"][0] |= {"action": NASTY, "invalid": NASTY}
    (row,) = samples.as_markdown(some).splitlines()[2:]
    assert "<script" not in row and "\x1b" not in row and row.count("|") == 1 + len(samples.COLUMNS)  # borders of cells
    assert visible("a\tb\nc\x07\u200b\x9b") == "a\tb\nc\\x07\\u200b\\x9b"


# --- pictures, parsers, cut replies ---

TAGS = make_parser("tags", words=(("left", "right"),))
REPLIES = ["<think>why</think><answer>left</answer>", "<answer>up</answer>", "  ", "right"]


def picture(number):
    return np.full((4, 6, 3), number % 256, np.uint8)


def decide(recorder, episode, number, reply="x", cut=False):
    seen = {"message": ["not this one", f"m{number}"], "image": np.stack([picture(0), picture(number)])}
    recorder.add(episode, seen, Decisions(["no", reply], None, {"cut": np.array([False, cut])}), 0.5, 1)


def test_turns_say_what_a_parser_reads_and_what_was_cut(tmp_path):
    recorder = samples.Samples(TAGS)
    for number, reply in enumerate(REPLIES):
        decide(recorder, 0, number, reply, cut=number == 3)
    recorder.end(0, 2.0)
    (one,), files = recorder.ended([7], [2.0], [True])
    read = [(t.get("action"), t.get("invalid"), t.get("cut")) for t in one["turns"]]
    assert read == [
        ("left", None, None),
        (None, "unknown_word", None),
        (None, "empty", None),
        (None, "no_answer", True),
    ]
    assert samples.parts(one["turns"][0]) == [
        ("", "<think>"), ("thought", "why"), ("", "</think><answer>"), ("said", "left"), ("", "</answer>")
    ]  # fmt: skip
    assert [t["prompt"] for t in one["turns"]] == ["m0", "m1", "m2", "m3"]
    for number, turn in enumerate(one["turns"]):
        with Image.open(io.BytesIO(files[turn["images"]["image"]])) as image:
            assert np.array_equal(np.asarray(image), picture(number))
    samples.write_samples(tmp_path / "x", [one])
    assert samples.read_samples(tmp_path / "x") == [one]
    long = {**one["turns"][0], "reply": one["turns"][0]["reply"] + "x" * 9_000}
    samples.write_samples(tmp_path / "x", [{**one, "turns": [long]}])
    (short,) = samples.read_samples(tmp_path / "x")
    assert "thought" not in short["turns"][0] and short["turns"][0]["action"] == "left"  # spans fit no shorter reply


@given(returns=strategies.lists(strategies.integers(0, 4), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_all_that_are_shown_have_their_pictures_and_hardly_more_are_kept(returns):
    recorder = samples.Samples()
    for episode, value in enumerate(returns):
        decide(recorder, episode, episode)
        recorder.end(episode, float(value))
    assert len(recorder._seen) <= 9 * samples.SHOWN
    every, files = recorder.ended(range(len(returns)), [float(r) for r in returns], [False] * len(returns))
    shown = [one for some in samples.pick(every).values() for one in some]
    assert all(one["turns"][0]["images"]["image"] in files for one in shown)
    assert len(files) == len(shown) and sum("images" in one["turns"][0] for one in every) == len(shown)


def test_pictures_are_few_small_and_once():
    recorder = samples.Samples()
    for number in range(100):
        decide(recorder, 0, number)
        assert len(recorder._running[0]) <= samples.MOST_TURNS
    recorder.end(0, 0.0)
    _, files = recorder.ended([7], [0.0], [False])
    half = samples.MOST_TURNS // 2
    kept = [pictures.digest_of(picture(n)) for n in (*range(half), *range(100 - half, 100))]
    assert set(files) == set(kept)
    assert pictures.reduced(np.zeros((1024, 2048, 3), np.uint8)).shape == (256, 512, 3)
    assert pictures.encode(pictures.reduced(np.zeros((8, 9, 1), np.uint8))).startswith(b"\x89PNG")
    decide(recorder, 1, 0)
    recorder.forget(1)
    recorder.end(1, 9.0)
    assert len(recorder.ended([7, 8], [0.0, 9.0], [False, True])[0]) == 1


def test_a_folder_of_pictures_has_an_end_and_verdicts_find_room(tmp_path, monkeypatch):
    files = {pictures.digest_of(picture(n)): pictures.encode(picture(n)) for n in range(12)}
    monkeypatch.setattr(pictures, "MOST_FILES", 8)
    for _ in range(2):
        pictures.write_pictures(tmp_path, files, room=0.5)
        assert [path.stem for path in sorted(tmp_path.iterdir())] == sorted([*files][:4])
    pictures.write_pictures(tmp_path, files)
    assert len([*tmp_path.iterdir()]) == 8
    monkeypatch.setattr(pictures, "MOST_BYTES", 1)
    pictures.write_pictures(tmp_path / "none", files)
    assert not (tmp_path / "none").exists()
    digest = [*files][0]
    assert pictures.data_url(tmp_path, digest).startswith("data:image/png;base64,")
    (tmp_path / f"{digest}.png").write_bytes(b"<script>")
    (tmp_path / "secret.png").write_bytes(files[digest])
    for bad in (digest, "../secret", "secret", "f" * 32, 7, None, [digest]):
        assert pictures.data_url(tmp_path, bad) is None


def say(observation):
    said = [prompt[:1] for prompt in observation["prompt"]]
    return Decisions(said, np.zeros((len(said), 1)))


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
    assert page.count("replies, ") == 2 and page.count('class="evaluation" open') == 2 and "<h2>Samples</h2>" in page
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
