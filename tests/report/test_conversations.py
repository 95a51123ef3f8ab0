"""Conversations as people meet them: page, terminal, logs. All is shown as it was said, and nothing of it acts."""

import io
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from rich.console import Console

from embodied_rft import cli
from embodied_rft.evaluation import pictures, samples
from embodied_rft.files import write_json
from embodied_rft.names import visible
from embodied_rft.options import parse
from embodied_rft.report import conversations
from embodied_rft.report.figures import part
from embodied_rft.report.page import incidents, write_report
from embodied_rft.report.run import Run
from embodied_rft.report.terminal import show
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train
from tests.lab import picture_talk
from tests.report.test_report import Page

PIECES = [
    "<script>alert(1)</script>", "</div></details>", "{{ 7*7 }}", "{% raw %}", "<|im_end|>", "[/red]", "[bold]",
    "\x1b[31m", "\u202e", "&amp;", "&#60;", "\"'", "<!--", "]]>", "`|", "\n", "\x00", "\ud800", "\u4f60\u597d",
    "<img src=x onerror=y>", "a",
]  # fmt: skip
TEXTS = strategies.lists(strategies.sampled_from(PIECES), max_size=4).map("".join)
RULES = "".join(PIECES[:12])


class Shown(Page):
    """A page whose texts are kept as they are, and all attributes and tags."""

    def __init__(self, text):
        self.tags, self.attributes = set(), set()
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {key for key, _ in attrs}
        super().handle_starttag(tag, attrs)


def sample_of(prompt, reply, action, invalid, thought):
    turn = {"prompt": prompt, "reply": reply, "reward": 1.0, "action": action, "invalid": invalid, "cut": True}
    turn |= {"thought": [0, min(thought, len(reply))], "images": {prompt: reply}}
    return {"episode": 0, "seed": 7, "return": 1.0, "success": False, "turns": [turn]}


def in_terminal(folder, **options):
    stream = io.StringIO()
    show(folder, console=Console(file=stream, width=200, highlight=False, emoji=False), **options)
    return stream.getvalue()


def folder_of(tmp_path, lines, **evaluation):
    (tmp_path / "recipe.yaml").write_text("name: talk\n")
    content = {"name": "policy", "episodes": 1, "success": 0.0, "low": 0.0, "high": 0.7, "samples": "a.samples.jsonl"}
    write_json(tmp_path / "evaluations" / "a.json", content | {"mean_return": 0.0, "decisions": 5} | evaluation)
    (tmp_path / "evaluations" / "a.samples.jsonl").write_bytes(lines)
    return tmp_path


@given(prompt=TEXTS, reply=TEXTS, action=TEXTS, invalid=TEXTS, name=TEXTS, thought=strategies.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_what_was_said_is_shown_and_never_acts(prompt, reply, action, invalid, name, thought):
    one = conversations.conversation(sample_of(prompt, reply, action, invalid, thought))
    said = conversations.Said(visible(name), "about", visible(reply), 2, [one], open=True)
    text = str(part("said", said))
    page = Shown(text)
    assert page.tags <= {"details", "summary", "strong", "p", "code", "div", "span"}
    assert page.attributes <= {"class", "open"}
    assert not page.links and not re.search("[\x00\x1b\u202e\ud800]", text)
    words = "".join(page.words)
    assert all(visible(each) in words for each in (prompt, reply, action, invalid, name))


ANYTHING = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | TEXTS,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=3), inner),
    max_leaves=5,
)
WHOLE = sample_of("p", "<a>r</a>", "r", "empty", 3) | {"turns_left_out": 2}
DAMAGED_TURNS = strategies.sampled_from([*WHOLE["turns"][0]]).flatmap(
    lambda key: ANYTHING.map(lambda value: {**WHOLE, "turns": [{**WHOLE["turns"][0], key: value}]})
)
DAMAGED = strategies.sampled_from([*WHOLE]).flatmap(lambda key: ANYTHING.map(lambda value: {**WHOLE, key: value}))


@given(lines=strategies.lists(DAMAGED | DAMAGED_TURNS | ANYTHING, max_size=3), cut=strategies.integers(0, 300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_of_samples_hides_nothing_else(tmp_path, lines, cut):
    whole = json.dumps({**WHOLE, "episode": 123_456}).encode()
    given_ = b"\n".join([whole, *(json.dumps(line).encode() for line in lines), whole[:cut], b"\xff\xfe\r"])
    folder = folder_of(tmp_path, given_)
    read = samples.read_samples(folder / "evaluations" / "a.samples.jsonl")
    assert any(one.get("episode") == 123_456 for one in read)
    assert samples.as_markdown(read) and samples.rows_of(samples.pick(read))
    text = in_terminal(folder)
    assert "123456" in text
    for one in read:
        if "episode" in one:
            in_terminal(folder, number=one["episode"])
    Shown(write_report(folder).read_text().replace("<br>", ""))


def test_a_page_has_an_end_and_names_what_it_leaves_out(tmp_path):
    many = [{**WHOLE, "episode": i, "return": float(i), "turns": WHOLE["turns"] * 20} for i in range(20)]
    folder = folder_of(tmp_path, b"\n".join(json.dumps(one).encode() for one in many))
    for i in range(5):
        content = json.loads((folder / "evaluations" / "a.json").read_text())
        write_json(folder / "evaluations" / f"b{i}.json", content | {"name": f"curve {i}", "sheet": 1, "decisions": i})
    run = Run.read(RunFolder(folder))
    said, without = conversations.said_in(run)
    assert [len(one.conversations) for one in said] == [9, *[3] * 5] and not without
    assert [one.open for one in said] == [True, *[False] * 5]
    size = 20 * (len("p") + len("<a>r</a>") + 300)
    said, without = conversations.said_in(run, most=11 * size)
    assert [len(one.conversations) for one in said] == [9, 2] and len(without) == 4
    room = conversations.Room(run, 100)
    assert room.take(60) and not room.take(60) and room.take(40)


def test_incidents_are_told_apart_from_failures(tmp_path):
    folder = folder_of(tmp_path, json.dumps(WHOLE).encode())
    assert not incidents(Run.read(RunFolder(folder)))
    write_json(folder / "incidents.json", {"counts": {"infrastructure/<timeout>": 7, "crash": 2}, "latest": []})
    text = Shown(write_report(folder).read_text()).text
    assert "9 incidents in environments (crash 2, infrastructure/<timeout> 7): no failures of the policy" in text
    for damaged in ({}, {"counts": 3}, {"counts": {"x": "y"}}):
        write_json(folder / "incidents.json", damaged)
        assert not incidents(Run.read(RunFolder(folder)))


# --- whole runs ---


def erft(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_of_a_picture_game_is_read_by_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    tree = {
        "env": {"id": picture_talk.ID, "num_envs": 3, "options": {"rules": RULES}},
        "agent": {"id": "language", "model": {"tiny_vlm": {}}, "max_new_tokens": 3, "key": "message"},
        "buffer": {"capacity": 100},
        "threads": 1,
        "logging": {"tensorboard": True, "wandb": "offline", "console": False},
        "stages": [{"evaluate": {"name": "first", "episodes": 12}}, {"evaluate": {"episodes": 4}}],
    }
    run = tmp_path / "run"
    train(parse(Recipe, tree), run, quiet=True)
    content = json.loads((run / "evaluations" / "0-0.json").read_text())
    kept = samples.read_samples(run / "evaluations" / content["samples"])
    turns = [turn for one in kept for turn in one["turns"]]
    assert len(kept) == 12 and len(turns) == 36
    assert all(("action" in turn) != ("invalid" in turn) for turn in turns) and any("cut" in turn for turn in turns)
    assert [turn["reward"] < 0 for turn in turns] == ["invalid" in turn for turn in turns]
    assert sum(content["said"]["invalid"].values()) == sum("invalid" in turn for turn in turns)
    shown = [turn["images"]["image"] for some in samples.pick(kept).values() for one in some for turn in one["turns"]]
    files = {path.stem for path in (run / "pictures").iterdir()}
    assert len(shown) == 27 and set(shown) <= files
    page = Shown((run / "report.html").read_text())
    urls = {pictures.data_url(run / "pictures", digest) for digest in shown}
    assert urls <= set(page.links) and all(link.startswith("data:") for link in page.links)
    assert "invalid: " in page.text and visible(RULES.split("\n")[0]) in " ".join(page.words)
    assert [*(run / "wandb").glob("offline-run-*/files/media/table/samples/*.table.json")]
    capsys.readouterr()

    assert erft("show", run) == 0
    listed = capsys.readouterr().out
    assert "first" in listed and "policy: 4 episodes are kept" in listed and listed.count("turns") == 4
    assert erft("show", run, "--episode", 11, "--evaluation", "first") == 0
    said = capsys.readouterr().out
    assert "first, episode 11, initial state" in said and said.count("reward ") == 3 and "turn 2  [image]" in said
    assert "<|im_end|>" in said and "\x1b" not in said and "[/red][bold]" in said
    for arguments, message in (
        (["--evaluation", "frist"], "no evaluation 'frist'; did you mean 'first'?"),
        (["--episode", "12"], "no episode 12 in 'policy'; kept are 0 to 3"),
        (["--episode", "-1"], "no episode -1 in 'policy'; kept are 0 to 3"),
    ):
        assert erft("show", run, *arguments) == 2
        assert message in capsys.readouterr().err


def test_show_says_what_is_missing_and_tells_evaluations_of_one_name_apart(tmp_path, capsys):
    assert erft("show", tmp_path) == 2 and "not a run folder" in capsys.readouterr().err
    folder = folder_of(tmp_path, json.dumps(WHOLE).encode())
    content = json.loads((folder / "evaluations" / "a.json").read_text())
    write_json(folder / "evaluations" / "b.json", content | {"decisions": 9, "wall_seconds": 2})
    write_json(folder / "evaluations" / "c.json", content | {"decisions": 9, "wall_seconds": 3, "sheet": 1})
    assert list(conversations.evaluations_of(Run.read(RunFolder(folder)))) == ["policy@5", "policy@9", "policy@9#2"]
    assert erft("show", folder, "--episode", "0") == 0
    told = capsys.readouterr().out
    assert told.startswith("policy@9, episode 0, initial state 7: failure") and "2 turns are left out" in told
    for name in "abc":
        path = folder / "evaluations" / f"{name}.json"
        write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "samples"})
    assert erft("show", folder) == 2 and "holds no samples" in capsys.readouterr().err
