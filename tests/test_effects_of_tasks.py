"""No option without effect, of environments, demonstrators and rules: what is seen, paid, done or judged changes."""

import functools
import json
import re

import gymnasium
import numpy as np

import embodied_rft.envs  # noqa: F401
from embodied_rft import registry
from embodied_rft.experience.demonstrate import make_demonstrator, write_demos
from embodied_rft.pools.pool import make_pool
from embodied_rft.turns.parsing import make_parser
from tests.lab.effects import Walk, listed, tally
from tests.lab.worlds import IDS as WORLD_IDS
from tests.lab.worlds import PAGES, SERVED

SMALL = {"cameras": ["front"], "image_size": 16, "num_threads": 1}
VALUES = {
    "observe": "image",
    "style": "short",
    "rules": "Walk.",
    "parser": "words",
    "reward_type": "dense",
    "engine": "rollout",
    "cameras": ["side"],
    "image_size": 24,
    "max_episode_steps": 2,
    "template": "What is {sum}?",
    "rule": "exact",
    "checker": "contains",
    "overlong": [1, 2],
    "held_out": 0.5,
    "exclude": ["problems.jsonl, line 2"],
    "max_chars": 70,
    "observation": "state",
}
EXEMPT = {"num_threads": "how many threads step is no business of the results (tests/envs)"}
CONTEXTS = {"episodes": {"file": None, "of": "embodied_rft/ClickScreen-v0"}}
TASKS = {  # id: its options
    "embodied_rft/FetchReach-v0": SMALL,
    "embodied_rft/PegInsert-v0": {**SMALL, "cameras": ["wrist"]},
    **{f"embodied_rft/Text{task}-v0": {} for task in ("Sum", "Countdown", "Format", "Jsonl")},
}
GAMES = {  # id: other values of its options
    "embodied_rft/BlackJack-v0": {},
    "embodied_rft/EZPoints-v0": {},
    "embodied_rft/FrozenLake-v0": {"slip": 0.5},
    "embodied_rft/GeneralPoints-v0": {"cards": 3, "face_cards": "rank", "suits": "black", "tries": 1},
    "embodied_rft/NumberLine-v0": {},
    "embodied_rft/Points24-v0": {"face_cards": "rank"},
    "embodied_rft/ShisenSho-v0": {"size": 4, "colors": 5, "shapes": 5},
    "embodied_rft/Sokoban-v0": {"reward": "sparse"},
    "embodied_rft/Swap-v0": {"kinds": 5, "moves": 1, "goal": 1, "reward": "score"},
    "embodied_rft/TwentyFortyEight-v0": {"goal": 8, "reward": "score"},
}
TASKS |= dict.fromkeys(GAMES, {"observation": "both"})
TASKS["embodied_rft/Swap-v0"] = {"observation": "both", "kinds": 4}  # with few kinds some swaps are valid
CLOCK = [{"id": "TimeLimit", "max_episode_steps": 1}]
LIFTS = {"wrap": CLOCK, "bins": 3, "digits": 1, "decimals": 1, "turns": 1, "of": "MountainCarContinuous-v0"}
TOLD = {  # what is lifted: other values of the options
    "embodied_rft/ToldFrozenLake-v0": {**LIFTS, "options": {"size": 5}, "words": list("lrud"), "instead": "left"},
    "embodied_rft/Told-v0": {**LIFTS, "options": {"g": 3.0}, "words": [list("abcde")], "instead": "0"},
}
CALLS = {"parser": {"id": "tags", "tags": ["calc"]}, "max_calls": 1, "style": "full"}
TOOLS = {"embodied_rft/ToolSum-v0": CALLS, "embodied_rft/ToolJsonl-v0": CALLS}  # beside a tool: likewise
TASKS |= dict.fromkeys(TOOLS, {"style": "short"})
TASKS |= {"embodied_rft/ToldFrozenLake-v0": {}, "embodied_rft/Told-v0": {"of": "Pendulum-v1"}}
SCREENS = {  # drawn, and clicked on: likewise
    "embodied_rft/ClickScreen-v0": {
        "observe": "text",
        "colors": 3,
        "shapes": 3,
        "tasks": ["pair"],
        "grid": [16, 16],
        "size": 80,
        "parser": "tags",
        "turns": 1,
    },
    "embodied_rft/Grounding-v0": {
        "answer": "point",
        "rewards": {"hit": 0.5},
        "kinds": ["word"],
        "grid": [9, 9],
        "size": 80,
        "parser": "tags",
        "sides": [8, 9],
    },
    "embodied_rft/RecordedSteps-v0": {
        "rewards": {"verb": 1.0},
        "parser": "tags",
        "options": {"popups": 0.0},
        "of": "embodied_rft/ClickScreen-v0",
        "radius": 40.0,
        "history": 0,
        "grid": [7, 7],
    },
}
TASKS |= dict.fromkeys(SCREENS, {"grid": [8, 8]})
SAME = {  # the options of another one
    **{f"embodied_rft/Fetch{task}-v0": "embodied_rft/FetchReach-v0" for task in ("PickAndPlace", "Push", "Slide")},
    **{id.replace("/", "/Told"): "embodied_rft/ToldFrozenLake-v0" for id in GAMES if "Lake" not in id},
}
OTHERS = {"CartPole-v1"}  # environments of other packages, which we show how to play
BROWSED = {"embodied_rft/Desk-v0", *PAGES}  # need a browser (tests/envs/gui)
WORLDS = {*WORLD_IDS, *SERVED, *BROWSED}  # of other packages, walked in test_effects_of_worlds.py
REPLIES = ["7", "<think>7</think><answer>7</answer>", '{"a": 7}']
PLACES = [f"{x} {y}{box}" for x in range(8) for y in range(8) for box in ("", f" {x + 2} {y + 2}")]
CALLED = ['{"name": "calculator", "arguments": {"expression": "3+4"}}', *REPLIES]
MOVES = ["<answer>left</answer>", "<answer>l</answer>", "<answer>-2</answer>", "right", "<answer>0.1 </answer>"]


def visit(id, options, situation):
    """A few steps of some environments; of those that answer texts, as many episodes."""
    count, steps = (32, 6) if id in {*GAMES, *SCREENS} else (8, 3)
    key = "message" if id in {*TOLD, *TOOLS, *SCREENS} else "prompt"
    pool = make_pool(id, count, options=options)
    pool.action_space.seed(0)
    try:
        seen = [pool.reset(np.arange(count))]
        for number in range(steps):
            if isinstance(pool.action_space, gymnasium.spaces.Text):
                spoken = [*MOVES, *REPLIES] if id in TOLD else CALLED if id in TOOLS else REPLIES
                if id in SCREENS:
                    spoken = [*REPLIES, *PLACES[number :: 2 + number % 2]][:count]
                action = [*spoken, *map(add, seen[-1][key][len(spoken) :])]
            else:
                action = np.stack([pool.action_space.sample() for _ in range(count)])
            told = pool.step(action)
            seen.append((told.reward, told.terminated, told.truncated, told.info, told.observation))
            over = told.terminated | told.truncated
            seen.append(pool.reset(np.arange(count) + count * (number + 1), over) if over.any() else told.observation)
        return seen, pool.get_state(), str(pool.observation_space)
    finally:
        pool.close()


def add(prompt):
    """A sentence with the sum of its numbers."""
    return f"It is {sum(map(int, re.findall(r'[0-9]+', prompt)))}."


def of_task(id, folder):
    """The walk over the options of one environment."""
    base, values = (
        TASKS[id],
        VALUES | {name: value for some in (GAMES, TOLD, TOOLS, SCREENS) for name, value in some.get(id, {}).items()},
    )
    if "Jsonl" in id:
        base, values["path"] = {**base, "path": problems(folder, 7)}, problems(folder, 11)
    if "Recorded" in id:
        base, values["file"] = {**base, "file": episodes(folder, 7)}, episodes(folder, 11)
    if "Peg" in id:
        values["cameras"] = ["front"]
    options, made = listed("env", id, "env"), functools.partial(visit, id)
    return Walk(f"env {id}", options, made, base, values, CONTEXTS, exempt=EXEMPT)


def problems(folder, answer):
    """A file of problems."""
    path = folder / str(answer) / "problems.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [{"prompt": f"{number} + {answer - number} =", "answer": str(answer)} for number in range(8)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def episodes(folder, seed):
    """A file of demonstrations, without elements: what counts is how near an answer is."""
    path, options = folder / f"{seed}.safetensors", {"expert": True, "grid": [8, 8]}
    write_demos("embodied_rft/ClickScreen-v0", path, episodes=12, seed=seed, options=options)
    return str(path)


def demonstrate(id, options, situation):
    """What a demonstrator does in twelve steps."""
    shown = {"observation": "state"} if id in GAMES else {"state": True, "told": True} if id in TOLD else {}
    shown |= {"expert": True} if id in SCREENS else {}
    shown |= {"of": "embodied_rft/ClickScreen-v0"} if "Recorded" in id else {}
    pool = make_pool(id, 4, options=shown)
    demonstrator, rng, done = make_demonstrator(id, env_options=shown, **options), np.random.default_rng(0), []
    try:
        observation = pool.reset(np.arange(4))
        for _ in range(12):
            done.append(demonstrator.act(observation, rng))
            result = pool.step(done[-1])
            over = result.terminated | result.truncated
            observation = pool.reset(np.arange(4), over) if over.any() else result.observation
        return done
    finally:
        pool.close()


def of_demonstrator(id):
    """The walk over the options of one."""
    options = listed("demonstrator", id, f"demonstrator {id}")
    values = {"thought": "state", "player": {"slip": 0.9}}
    return Walk(f"demonstrator {id}", options, functools.partial(demonstrate, id), values=values)


THINKING = [f"<think>t</think><answer>{number}</answer>" for number in (7, 8)]


def judge(id, options, situation):
    """What a rule says of some replies."""
    rule = registry.find("reward", id)
    answer = {"exact": "seven", "calls": CALLED[0]}.get(id, "7")
    told = [CALLED[0].replace("3+4", "7"), "7", "It is 7.", "7.2", "11.0", "<a>7</a>", *THINKING, "Seven", "seven"]
    return [rule(reply, answer, **options) for reply in told]


def of_rule(id):
    """The walk over the options of one."""
    values = {"tolerance": 0.3, "tags": ["a"], "rule": "numeric"}
    contexts = {"relative": {"tolerance": 0.6}}
    options = listed("reward", id, f"reward {id}")
    return Walk(f"reward {id}", options, functools.partial(judge, id), values=values, contexts=contexts)


SAID = ["<think>t</think><answer>left</answer>", "so <answer>Left.</answer>", "(left)", "Left", "left", "<a>left</a>"]
SAID += [
    '{"thought": "t", "action": "Left"}',
    '{"a": "left."}',
    '{"action": "left."} {"a": 7, "action": "right"}',
    '{"action": "left."}',
]
SAID += [f'{say}{{"name": "{name}", "arguments": {{"a": "{word}"}}}}' for say, name, word in (
    ("", "go", "left"), ("so ", "run", "Left"), ("", "go", "left.")
)]  # fmt: skip


def read(id, options, situation):
    """What a parser reads in some replies."""
    return [make_parser({"id": id, **options}).parse(text) for text in SAID]


def of_parser(id):
    """The walk over the options of one."""
    base = {"words": [["left"]], **({"argument": "a"} if id == "tool_call" else {})}
    values = {"words": [["right"]], "tags": ["a"], "action": "a", "thought": "a", "tool": "go", "argument": "b"}
    return Walk(f"parser {id}", registry.config_of("parser", id), functools.partial(read, id), base, values)


def walks(folder):
    """All of this file."""
    tasks = [of_task(id, folder) for id in TASKS]
    # By their environment; they have a name as well. What is lifted has one demonstrator.
    own = [id for id in registry.shipped("demonstrator") if id in {*TASKS, *OTHERS} and id != "embodied_rft/Told-v0"]
    return [
        *tasks,
        *map(of_demonstrator, own),
        *map(of_rule, registry.shipped("reward")),
        *map(of_parser, registry.shipped("parser")),
    ]


def test_options_of_tasks(tmp_path):
    found = tally(walks(tmp_path))
    print(found)
    assert not found["dead"], found["dead"]


def test_every_task_is_walked():
    shipped = {id for id in gymnasium.registry if id.startswith("embodied_rft/")}
    assert shipped == set(TASKS) | set(SAME) | WORLDS
    options = {id: [option.name for option in listed("env", id, "env")] for id in shipped - WORLDS}
    assert all(options[id] == options[as_of] for id, as_of in SAME.items())
