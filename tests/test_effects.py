"""No option without effect: each one of every objective changes what is computed or written, or is refused."""

import functools

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from embodied_rft import registry
from embodied_rft.buffer.plans import Drawn
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.learning.objective import Objective
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.curricula import make_curriculum
from embodied_rft.objectives.implicit import IQL, IQLConfig
from embodied_rft.options import STRICT, validate_plugin_config
from tests.lab import marked  # noqa: F401  (an agent)
from tests.lab.effects import Walk, tally
from tests.lab.scene import Scene, copies, experience, make_agent, shaken

GAUSSIAN = {"id": "gaussian", "hidden": [8]}
CHAIN = {"id": "diffusion", "width": 8, "num_blocks": 1, "denoising_steps": 3}
TINY_LM = {"tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}}
TALKS = {"id": "marked", "model": TINY_LM, "prompt": "plain", "max_new_tokens": 4}
STANDS = {  # where an objective is walked: (agent, its scene)
    "stochastic": (GAUSSIAN, {}),
    "stochastic goal": (GAUSSIAN, {"sees": ("state", "goal")}),
    "deterministic": ({**GAUSSIAN, "deterministic": True}, {}),
    "deterministic goal": ({**GAUSSIAN, "deterministic": True}, {"sees": ("state", "goal")}),
    "choice": ({"id": "categorical", "hidden": [8]}, {"acts": "choice"}),
    "choice goal": ({"id": "categorical", "hidden": [8]}, {"acts": "choice", "sees": ("state", "goal")}),
    "steering": ({"id": "steering", "base": CHAIN, "hidden": [8]}, {}),
    "chain": (CHAIN, {}),
    "text": ({**TALKS, "value_head": True}, {"sees": ("prompt",), "acts": "text", "num_steps": 2}),
}
POLICY_GRADIENT = ("ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gpg", "dppo", "reinflow", "gspo", "dapo", "gigpo")
STAND = dict.fromkeys(POLICY_GRADIENT, "chain") | dict.fromkeys(("dsrl_sac", "dsrl_na"), "steering")
STAND |= dict.fromkeys(("td3", "td3_bc", "spot"), "deterministic") | dict.fromkeys(("dqn", "discrete_sac"), "choice")

CRITIC = {"batch_size": 8, "critic_hidden": [8], "num_critics": 3}
BASE = dict.fromkeys(POLICY_GRADIENT, {"batch_size": 40, "num_epochs": 1})
BASE |= {"dqn": {"batch_size": 8, "target_every": 2, "epsilon_decisions": 2}, "density": {"hidden": [8]}}
BASE |= {"discrete_sac": {**CRITIC, "target_every": 2}, "dppo": {**BASE["ppo"], "critic_warm_up": 0}}
BASE |= {id: {**CRITIC, "policy_delay": 2} for id in ("rlpd", "wsrl")}
BASE |= dict.fromkeys(("iql", "sac", "td3", "td3_bc", "spot", "e2o", "dsrl_sac", "dsrl_na", "archer"), CRITIC)
BASE |= dict.fromkeys(("cql", "cal_ql"), {**CRITIC, "num_sampled_actions": 2})
BASE |= {"gflownet": {"batch_size": 40, "num_epochs": 1, "flow_hidden": [8]}}
BASE |= {"digirl": {"batch_size": 8, "value_hidden": [8], "top": 0.5, "reward_weights": {"success": 1.0}}}
BASE |= {"cpl": {"batch_size": 8, "segment": 2}, "gigpo": {**BASE["ppo"], "whole_groups": True}}

VALUES = {
    "reward_weights": {"env": -2.0},
    "offline_share": 0.25,
    "hindsight": 4,
    "target_clip": [-0.01, 0.01],
    "target_noise_clip": 0.01,
    "subset_size": 3,
    "explore_bonus": 10.0,
    "policy_value": "mean",
    "largest_weight": 0.5,
    "huber": 0.01,
    "overlong": [2, 1],
    "credit": "dr_grpo",
    "shaping": [{"id": "progress"}],
    "kl_turns": [0],
    "unit_weights": {"thought": 0.3},
    "difficulty": {"stream": "far"},
    "difficulty.stream": "far",
    "difficulty.power": -3.0,
    "difficulty.largest": 0.9,
    "ratio": "mean",
    "normalizer": "decisions",
    "clip_low": 1e-5,
    "clip_high": 1e-5,
    "clip_first": 1e-5,
    "dual_clip": 0.1,
    "target_kl": 1e-6,
    "min_groups": 100,
    "correction.limit": 1.001,
    "value_clip": 1e-4,
    "value_activation": "tanh",
    "selection.best_of": 2,
    "selection.newest": 4,
    "selection.where": "success",
    "selection.per": "state",
    "selection.min_return": -1.0,
    "within": "all",
    "min_gap": 1.0,
    "smoothing": 0.1,
    "cooling_updates": 5,
}
OWN_VALUES = {
    "dr_grpo": {"credit": "grpo"},
    "gpg": {"credit": "grpo", "ratio": "unit"},
    "grpo": {"ratio": "episode"},
    "rloo": {"ratio": "episode_mean"},
    "gspo": {"ratio": "episode"},
    "reinflow": {"ratio": "decision", "normalizer": "units"},
    "cpl": {"within": "group"},
    "gigpo": {"normalizer": "episodes"},
    "digirl": {"margin": 0.9, "value_keys": ["desired_goal"]},
    "gflownet": {"batch_size": 90, "floor": 1.0},
    **dict.fromkeys(("rlpd", "wsrl", "e2o"), {"policy_value": "min"}),
}
KL = {"kl_weight": 0.1}
VALUED = dict.fromkeys(
    ("value_hidden", "value_activation", "value_clip", "critic_warm_up", "trace_decay"), {"credit": "gae"}
)
CONTEXTS = {
    **dict.fromkeys(("kl_in", "kl_estimator", "kl_turns", "reference"), KL),
    "reference_decay": {**KL, "reference": "moving"},
    "min_groups": {"drop_even_groups": True, "credit": "grpo"},
    "drop_even_groups": {"credit": "grpo"},
    "gamma": {"credit": "gae"},
    "value_weight": {"credit": "gae"},
    **VALUED,
    **dict.fromkeys(("unit_gamma", "unit_trace_decay"), {"credit": "bi_level_gae"}),
    "ratio": {"normalizer": "decisions"},
    "normalizer": {"ratio": "unit"},
    "normalizer_units": {"normalizer": "constant", "whole_groups": True, "ratio": "unit"},
    "whole_groups": {"normalizer": "units", "ratio": "unit"},
    **dict.fromkeys(("clip_low", "clip_high"), {"ratio": "unit"}),
    **dict.fromkeys(("target_kl", "dual_clip"), {"ratio": "unit"}),
    "clip_first": {"ratio": "unit", "normalizer": "units", "clip_low": 0.2, "clip_high": 0.2},
    "unit_discount": {"ratio": "unit", "normalizer": "units"},
    **dict.fromkeys(("difficulty.power", "difficulty.largest"), {"difficulty": {"stream": "far"}}),
    "subset_size": {"target": "random_subset"},
    "cooling_updates": {"final_support_weight": 0.05},
    "sub_decay": {"balance": "sub_trajectory"},
    "reward_weights": {"selection": {"best_of": 1}},
    "selection.per": {"selection": {"best_of": 1}},
}
SITUATIONS = {
    "hindsight": "goal",
    "value_keys": "goal",
    "warm_start": "trained",
    **dict.fromkeys(("unit_gamma", "unit_trace_decay", "value_weight", "cut"), "text"),
    **dict.fromkeys(("unit_weights", "unit_weights.thought", "unit_weights.action"), "text"),
}


@functools.cache
def stand(kind):
    """(agent, buffer) of a kind."""
    spec, scene = STANDS[kind]
    agent, pool = make_agent(spec, Scene(8, **scene))
    few = {"episodes": 24, "demonstrations": 2} if kind == "text" else {}
    buffer = experience(agent, pool, **few)
    rows = buffer.rows()
    buffer.label("far", rows, 1.0 + buffer.columns(rows)["episode"] % 3)
    return shaken(agent), buffer


def run_objective(id, options, situation):
    """Two rounds of learning from the same experience."""
    kind = STAND.get(id, "stochastic")
    kind = {"text": "text", "goal": f"{kind} goal"}.get(situation, kind)
    agent, buffer = copies(*stand(kind if kind in STANDS else STAND[id]))
    if situation == "text" and id in ("dppo", "reinflow"):  # made for chains of action numbers
        options = {"per_dimension": False, "clip_first": None, **options}
    if id == "spot":
        learn({"id": "density", "hidden": [8], "batch_size": 8}, agent, buffer)
    if situation == "trained":
        learn({"id": id, **options, "warm_start": True}, agent, buffer)
    return learn({"id": id, **options}, agent, buffer)


def learn(spec, agent, buffer):
    """What two rounds find and leave."""
    replayed = isinstance(build_objective(spec).reading, Drawn)
    groups = {} if replayed else {"group_size": 4, "episodes_per_iteration": 16}
    validate_plugin_config("stage", "finetune", {"objective": spec, **groups})
    objective = build_objective(spec)
    objective.setup(agent, torch.Generator().manual_seed(6))
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-2 if spec["id"] == "dqn" else 3e-3))
    found = []
    for number in range(2):
        objective.schedule(number)
        if type(objective).explore is not Objective.explore:
            shown = {k: v.numpy() for k, v in buffer.batch(buffer.rows()[:4]).observation.items()}
            taken = objective.explore(agent, shown, rng=torch.Generator().manual_seed(7))
            found += [taken.action, taken.log_prob]
        numbers = np.random.default_rng(number)
        found.append(learner.learn(buffer, numbers, **({"num_updates": 3} if replayed else {})))
        agent.version.fill_(1)  # the experience is fresh again
    return found, dict(agent.state_dict())


def of_objective(id):
    """The walk over one objective's options."""
    config = registry.find("objective", id).Config
    base = BASE.get(id, {"batch_size": 8})
    values = VALUES | ({"batch_size": 90} if id in POLICY_GRADIENT else {}) | OWN_VALUES.get(id, {})
    return Walk(f"objective {id}", config, functools.partial(run_objective, id), base, values, CONTEXTS, SITUATIONS)


PARTS = {  # plug-ins of an objective: {kind: {id: values of its own options}}
    "credit": {"gigpo": {"anchor": ["desired_goal"]}},
    "shaping": {"gated": {"gates": {"success": 0.5}}, "turns": {"weights": [1, 0]}},
}


def of_part(kind, id):
    """The walk over the own options of a credit or a shaping."""
    base = {"gates": {"success": -1.0}} if id == "gated" else {}
    mixed = {"env": 1.0, "success": 1.0}

    def run(options, situation):
        agent, buffer = copies(*stand("stochastic goal" if kind == "credit" else "stochastic"))
        spec = {"id": id, **options}
        made = {kind: [spec] if kind == "shaping" else spec, "reward_weights": mixed}
        return learn({"id": "ppo", "batch_size": 40, "num_epochs": 1, **made}, agent, buffer)

    return Walk(f"{kind} {id}", registry.config_of(kind, id), run, base, PARTS[kind].get(id, {}))


def of_curriculum(id):
    """The walk over the own options of a curriculum."""

    def run(options, situation):
        curriculum, found = make_curriculum({"id": id, **options}), []
        shown = {"task": ["a", "b", "c"], "message": ["x", "x", "y"]}
        for won in ([True, False, True], [True, False, False], [True, False, False]):
            names = curriculum.names(shown)
            found.append(curriculum.chances(names, shown, lambda shown: np.array([0.001, 0.5, 0.9])))
            curriculum.hear(names, np.array(won))
        return found, curriculum.state_dict()

    values = {"task": "message", "least": 0.9}
    return Walk(f"curriculum {id}", registry.config_of("curriculum", id), run, {}, values)


def walks():
    """All of this file."""
    parts = [(k, id) for k in PARTS for id in registry.shipped(k) if registry.config_of(k, id) is not None]
    tasks = [of_curriculum(id) for id in registry.shipped("curriculum")]
    return [*(of_objective(id) for id in registry.shipped("objective")), *(of_part(*part) for part in parts), *tasks]


def test_options_of_objectives():
    found = tally(walks())
    print(found)
    assert not found["dead"], found["dead"]


def test_a_planted_option_without_effect_is_found(monkeypatch):
    monkeypatch.setitem(registry._tables, "objective", dict(registry._tables["objective"]))
    monkeypatch.setitem(BASE, "planted", BASE["iql"])

    @dataclass(config=STRICT, kw_only=True)
    class PlantedConfig(IQLConfig):
        idle: float = 0.5  # read by nobody

    @registry.register("objective", "planted")
    class Planted(IQL):
        Config = PlantedConfig

    assert tally([of_objective("planted")])["dead"] == ["objective planted.idle"]
