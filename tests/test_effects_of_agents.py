"""No option without effect, of agents: each one changes how it acts or learns, or is refused."""

import contextlib
import functools

import numpy as np
import torch

from embodied_rft import registry
from embodied_rft.pools.states import unreadable
from tests.lab.effects import Walk, Work, tally
from tests.lab.scene import Scene, experience, make_agent
from tests.test_effects import CHAIN, GAUSSIAN, TALKS, learn

NETWORK = {"hidden": [8], "num_image_features": 4}
PLAIN = {"width": 8, "num_blocks": 1, "num_image_features": 4}
BOTH = ("state", "image")
TINY_VLM = {"tiny_vlm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vision_size": 16}}
SIGHT = ("images", "freeze_vision", "cache_bytes", "history.images", "model.tiny_vlm.")  # others: on texts
AGENTS = {  # (id, what is special): (base options, scene)
    ("gaussian", ""): (NETWORK, {"sees": BOTH}),
    ("gaussian", "deterministic"): ({**NETWORK, "deterministic": True}, {"sees": BOTH}),
    ("categorical", ""): (NETWORK, {"sees": BOTH, "acts": "choice"}),
    ("residual", ""): ({**NETWORK, "base": GAUSSIAN}, {"sees": BOTH}),
    ("steering", ""): ({**NETWORK, "base": CHAIN}, {"sees": BOTH}),
    ("last_steps", ""): ({"base": CHAIN, "num_steps": 1}, {}),
    ("queued", ""): ({"base": {**CHAIN, "horizon": 3}}, {}),
    ("diffusion", ""): ({**PLAIN, "denoising_steps": 3}, {"sees": BOTH}),
    ("flow", ""): ({**PLAIN, "num_steps": 3}, {"sees": BOTH}),
    ("flow", "learned"): ({**PLAIN, "num_steps": 3, "noise": "learned"}, {"sees": BOTH}),
    ("consistency", ""): ({**PLAIN, "num_levels": 6}, {"sees": BOTH}),
    ("language", ""): (
        {**TALKS, "id": "language", "key": "prompt"},
        {"sees": ("prompt", "instruction"), "acts": "text"},
    ),
    ("language", "pictures"): (
        {**TALKS, "id": "language", "model": TINY_VLM, "key": "prompt"},
        {"sees": ("image", "side", "prompt", "instruction"), "acts": "text", "num_steps": 3},
    ),
}
SIZES = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_size": 48,
    "vocab_size": 400,
    "image_size": 16,
    "patch_size": 4,
    "vision_size": 32,
}
AGENT_VALUES = {
    "keys": ["state"],
    "horizon": 2,
    "execute": 2,
    "log_std_range": [0.5, 0.6],
    "base": {**CHAIN, "horizon": 2},
    "system": "Be brief.",
    "key": "instruction",
    "stop": list("abcdefghijklmnopqrstuvwxyz"),
    "top_k": 5,
    "lora.targets": "q_proj",
    **{f"model.{tiny}.{name}": value for tiny in ("tiny", "tiny_vlm") for name, value in SIZES.items()},
    "images": ["image"],
    "marks": "words",
    "history.turns": 0,
    "history.images": 1,
    "model": {"tiny": {"hidden_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}},
    "statistics": "min_max",
    **dict.fromkeys(("min_std", "parallel.min_std", "flow.min_std"), 0.3),
    "cache_bytes": 0,
    "model.tiny.max_tokens": 8,
}
ADAPTED = {"train": "lora"}
AGENT_CONTEXTS = {
    "execute": {"horizon": 3},
    "exploration_noise": {"deterministic": True},
    "max_std": {"noise": "learned"},
    "noise_hidden": {"noise": "learned"},
    "system": {"prompt": "chat"},
    "history.first": {"history": {"turns": 0}},
    **dict.fromkeys(("lora.rank", "lora.alpha", "lora.targets"), ADAPTED),
}
# Options that spare time or memory: results stay what they are, and what is computed for them does not.
WORK = dict.fromkeys(("gradient_checkpointing", "token_chunk", "share_prefix", "cache_bytes"), "work")
SITUATIONS = {**WORK, "long_prompts": "listed"}
LIMITS = {"model.tiny.max_tokens": "exceed the model's context of 8 tokens"}
PROMPTS = {"short": {"prompt": "1?"}, "long": {"prompt": "1" * 5_000}}


def run_agent(id, scene, options, situation):
    """Acting in the scene, imitating and improving what was done, acting greedily."""
    options = {**options, "freeze_vision": True} if situation == "frozen" else options
    with Work() if situation in ("work", "frozen") else contextlib.nullcontext() as work:
        agent, pool = make_agent({"id": id, **options}, Scene(4, **scene))
        if situation == "listed":  # the environment says what it may begin with
            pool.ask = {"initial_observations": PROMPTS}.get
            return unreadable(pool, agent.policy.unreadable, leave_out=agent.policy.leaves_out)
        buffer = experience(agent, pool, episodes=8, demonstrations=4, group_size=2)
        found = [buffer.state_dict()]
        trainable = bool(agent.trainable("policy"))
        if trainable and hasattr(agent.policy, "imitation_loss"):
            found.append(learn({"id": "bc", "batch_size": 4}, agent, buffer))
        if trainable:
            found.append(learn({"id": "ppo", "batch_size": 16, "num_epochs": 1}, agent, buffer))
        taken = agent.policy.act(pool.reset(np.arange(4)), greedy=True, rng=torch.Generator().manual_seed(8))
    return found, taken.action, taken.log_prob, dict(agent.state_dict()), work and work.count


def of_agent(id, special):
    """The walk over one agent's options."""
    base, scene = AGENTS[id, special]
    values = AGENT_VALUES | ({"base": {**GAUSSIAN, "hidden": [4]}} if id == "residual" else {})
    walk = Walk(
        f"agent {id} {special}".strip(),
        registry.find("agent", id).Config,
        functools.partial(run_agent, id, scene),
        base,
        values,
        AGENT_CONTEXTS,
        SITUATIONS,
        limits=LIMITS,
    )
    if special == "pictures":
        walk.among, walk.situations = SIGHT, SITUATIONS | {"cache_bytes": "frozen"}
        walk.contexts = {"model.tiny_vlm.image_size": {"model.tiny_vlm.kind": "smolvlm"}}
    return walk


def walks():
    """All of this file."""
    return [of_agent(*key) for key in AGENTS]


def test_options_of_agents():
    found = tally(walks())
    print(found)
    assert not found["dead"], found["dead"]
