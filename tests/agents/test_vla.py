"""Vision-language-action policies: trunk against the model's own forward, heads, adapters and caches."""

import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.agents.models.feature_cache import FeatureCache
from embodied_rft.agents.models.processing import Pixels, Prompts
from embodied_rft.agents.models.tiny_vlm import TinyVLMConfig, tiny_vlm
from embodied_rft.agents.models.vlm import VLM
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.learning.agent import build_agent
from embodied_rft.policy import Reparametrised, able, build_policy
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.pools.protocol import fields_of
from embodied_rft.testing.check_policy import check_policy
from tests.lab.helpers_vla import HEADS, KINDS, SPACE, STEP, chunks, observation, policy, rng, same, tensors

# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon, execute", [(1, 1), (3, 2)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, head, horizon, execute):
    p = policy(kind, head, horizon=horizon, execute=execute)
    check_policy(p, SPACE, STEP if horizon == 1 else ChunkBox(STEP, horizon=horizon))
    units = {"tokens": 2 * execute, "parallel": execute, "flow": 4}
    assert p.num_units == units[head]


@pytest.mark.parametrize("head", HEADS)
def test_the_first_ratio_through_the_buffer_is_one(head):
    agent = build_agent(policy(head=head, horizon=2).spec, SPACE, ChunkBox(STEP, horizon=2), rng())
    p, seen = agent.policy, observation(4)
    schema = Schema(fields_of(SPACE), fields_of(agent.spaces.action)["observation"], dict(p.trace_fields), p.num_units)
    buffer = Buffer(schema, 100)
    taken = p.act(seen, rng=rng(1))
    never = np.zeros(4, bool)
    buffer.add(
        np.arange(4), seen, taken, np.ones(4, np.float32), ~never, never, group=0, seed=0, step=0, version=1, source=2
    )
    buffer.close(np.arange(4), seen)
    batch = buffer.batch(buffer.rows(), next_observation=False)
    log_prob, _ = p.log_prob(batch.observation, batch.action, batch.trace)
    assert torch.allclose(log_prob, batch.log_prob, atol=1e-5)


@pytest.mark.parametrize("head", ["tokens", "parallel"])
def test_other_decisions_have_other_probabilities(head):
    p, seen = policy(head=head), observation()
    taken = p.act(seen, rng=rng())
    own, _ = p.log_prob(tensors(seen), None, tensors(taken.trace))
    other, _ = p.log_prob(tensors(seen), None, {k: v.roll(1, 0) for k, v in tensors(taken.trace).items()})
    assert (own - other).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_probabilities_of_tokens_are_those_of_all_outcomes(temperature):
    """U = 2 tokens of 3 bins: the nine probabilities sum to one, and sampling hits them, at any temperature."""
    p, seen = policy(tokens={"bins": 3, "temperature": temperature}), observation(1)
    with torch.no_grad():
        p.head.output.weight.mul_(3)
    tokens = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    many = {k: v.expand(9, *v.shape[1:]) if isinstance(v, torch.Tensor) else v * 9 for k, v in tensors(seen).items()}
    log_prob, entropy = p.log_prob(many, None, {"tokens": tokens})
    joint = log_prob.sum(1).exp().detach()
    assert torch.allclose(joint.sum(), torch.ones(()), atol=1e-5)
    first = torch.stack([joint[3 * i : 3 * i + 3].sum() for i in range(3)])
    assert torch.allclose(entropy[0, 0], -(first * first.log()).sum(), atol=1e-5)
    draws = {k: np.repeat(np.asarray(v), 4000, 0) if not isinstance(v, list) else v * 4000 for k, v in seen.items()}
    drawn = p.act(draws, rng=rng()).trace["tokens"]
    share = np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / 4000
    assert np.abs(share - joint.numpy()).max() < 0.04


def test_flow_steps_are_the_gaussians_that_they_say():
    """Against a loop over steps with one call of the expert each."""
    p, seen = policy(head="flow", horizon=2), tensors(observation())
    chain = torch.from_numpy(p.act(observation(), rng=rng()).trace["chain"])
    log_prob, _ = p.log_prob(seen, None, {"chain": chain})
    context = p.context(seen)
    memory = p.head.expert.read(p.vlm.states(context))
    for k in range(4):
        x, t = chain[:, k], k / 4
        v = p.head.expert(x[:, None], torch.full((3, 1), t), memory, context.mask)[:, 0]
        mean = x + v / 4 - 0.5 * (1 - t) * (x - t * v) / 4
        std = max((1 - t) / 2, 0.1)
        expected = torch.distributions.Normal(mean, std).log_prob(chain[:, k + 1]).sum(-1)
        assert torch.allclose(log_prob[:, k], expected, atol=1e-4)


def test_greedy_flows_start_from_drawn_noise_and_integrate_without_more():
    p, seen = policy(head="flow", horizon=2), tensors(observation())
    drawn = p.act(observation(), greedy=True, rng=rng(3)).action
    start = torch.randn(len(drawn), p.size, generator=rng(3))
    assert torch.allclose(p.from_noise(seen, start), torch.from_numpy(drawn), atol=1e-5)
    assert np.abs(drawn - p.mode(seen).detach().numpy()).max() > 0.05
    p = policy(head="flow", horizon=2, flow={"greedy_start": "zero"})
    still = p.act(observation(), greedy=True, rng=rng(3)).action
    assert np.allclose(still, p.mode(seen).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("head", ["parallel", "flow"])
def test_mode_and_rsample_are_what_acting_does(head):
    p, seen = policy(head=head, horizon=2), tensors(observation())
    greedy, drawn = p.act(observation(), greedy=True), p.act(observation(), rng=rng(3))
    assert torch.allclose(p.mode(seen), torch.from_numpy(greedy.action), atol=1e-5)
    action, log_prob = p.rsample(seen, rng=rng(3))
    assert torch.allclose(action, torch.from_numpy(drawn.action), atol=1e-5)
    assert torch.allclose(log_prob, torch.from_numpy(drawn.log_prob).sum(1), atol=1e-4)
    assert torch.autograd.grad(action.sum(), next(p.head.parameters()))[0].abs().max() > 0
    assert able(policy(), Reparametrised) is None  # tokens have no gradient


def test_a_flow_head_can_be_steered():
    """DSRL: noise is the action, its gradient comes through the frozen model, zero noise is the greedy chunk."""
    p, seen = policy(head="flow", horizon=2), tensors(observation())
    assert torch.equal(p.from_noise(seen, torch.zeros(3, 4)), p.mode(seen))
    noise = torch.zeros(3, 4, requires_grad=True)
    assert torch.autograd.grad(p.from_noise(seen, noise).sum(), noise)[0].abs().min() > 0
    spec = {"id": "steering", "base": p.spec, "hidden": [16], "keys": ["state"]}
    steered = build_policy(spec, SPACE, ChunkBox(STEP, horizon=2), rng())
    check_policy(steered, SPACE, ChunkBox(STEP, horizon=2))
    with pytest.raises(ValueError, match="no noise to steer"):
        build_policy(spec | {"base": policy(horizon=2).spec}, SPACE, ChunkBox(STEP, horizon=2), rng())


def test_steps_of_a_chunk_see_each_other_only_if_bidirectional():
    for attention in ("bidirectional", "causal"):
        p = policy(head="parallel", horizon=3, parallel={"attention": attention})
        p.head._mean(p.vlm, p.context(tensors(observation())))[:, 0].sum().backward()
        later = p.head.queries.grad[1:].abs().max()
        assert (later > 0) == (attention == "bidirectional")


def test_what_is_not_executed_is_not_generated():
    p = policy(horizon=4, execute=2)
    taken = p.act(observation(), rng=rng())
    steps = taken.action.reshape(3, 4, 2)
    assert taken.trace["tokens"].shape == (3, 4)
    assert np.array_equal(steps[:, 2], steps[:, 1]) and np.array_equal(steps[:, 3], steps[:, 1])


def test_instruction_and_images_matter():
    p, seen = policy(), observation(1)
    base = p.features(tensors(seen))
    for key, value in {
        "instruction": ["close"],
        "image/wrist": seen["image/wrist"] // 2,
        "state": seen["state"] + 1,
    }.items():
        assert (p.features(tensors(seen | {key: value})) - base).abs().max() > 1e-4, key


def test_a_fixed_instruction_equals_the_same_text_in_the_observation():
    seen = observation(2) | {"instruction": ["push", "push"]}
    by_text = policy().act(seen, greedy=True)
    assert same(by_text, policy(instruction="push").act(seen, greedy=True))


def error_after_imitation(head, *, shift):
    """Mean distance of greedy chunks to three targets after a few steps towards them, or towards their neighbours'."""
    p, seen, target = policy(head=head, horizon=2), tensors(observation()), chunks(horizon=2)
    optimizer = torch.optim.Adam(p.parameters(), 3e-3)
    for i in range(60):
        optimizer.zero_grad()
        p.imitation_loss(seen, target.roll(shift * (1 + i % 2), 0), rng=rng(i)).mean().backward()
        optimizer.step()
    return np.abs(p.act(observation(), greedy=True).action - target.numpy()).mean()


@pytest.mark.parametrize("head", HEADS)
def test_imitation_learns_and_of_others_targets_it_does_not(head):
    """Five seeds: 0.005 to 0.6 with one's own targets, 1.0 to 1.8 with others'; it starts at 1.0 to 1.7."""
    assert error_after_imitation(head, shift=0) < 0.75
    assert error_after_imitation(head, shift=1) > 0.9


# --- the trunk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_equals_the_models_own_forward(kind):
    """Prompts of different length, padded: every prompt's last state as if it were alone in the model."""
    p, seen = policy(kind, space=gym.spaces.Dict({k: SPACE[k] for k in ("image/front", "instruction")})), observation()
    vlm = p.vlm
    front = torch.from_numpy(seen["image/front"])
    ours = vlm.states(vlm.read([front], seen["instruction"]))[:, -1]
    for i, text in enumerate(seen["instruction"]):
        given = vlm.pixels(front[i : i + 1])
        count = vlm._features(front[i : i + 1])[0].shape[1]
        ids = torch.from_numpy(vlm.prompts.encode([text], [count])[0])
        types = (ids == vlm.prompts.image_token).long()
        if kind == "qwen2_5_vl":
            given["mm_token_type_ids"] = types
        if kind == "paligemma":
            given["token_type_ids"] = torch.zeros_like(ids)  # the whole prompt is prefix
        theirs = vlm.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).last_hidden_state
        assert torch.allclose(ours[i], theirs[0, -1], atol=2e-5), (kind, i)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_walk_equals_one_pass(kind):
    p = policy(kind)
    context = p.context(tensors(observation()))
    further = torch.randn(3, 4, p.vlm.hidden_size, generator=rng())
    dense = p.vlm.states(context, further)
    hidden, decoding = p.vlm.start(context)
    walked = torch.stack([decoding.step(further[:, i]) for i in range(4)], 1)
    assert torch.allclose(torch.cat([hidden[:, -1:], walked], 1), dense[:, -5:], atol=1e-5)


def test_checkpointed_layers_give_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        p = policy(gradient_checkpointing=checkpointing)
        p.imitation_loss(tensors(observation()), chunks()).sum().backward()
        gradients.append({n: q.grad for n, q in p.named_parameters() if q.grad is not None})
        assert same(p.act(observation(), greedy=True), policy().act(observation(), greedy=True))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_rows_add_up():
    """Gradients of micro-batches sum to that of the batch."""
    p, seen, target = policy(head="parallel"), tensors(observation()), chunks()
    whole = torch.autograd.grad(p.imitation_loss(seen, target).sum(), p.head.queries)[0]
    parts = [
        torch.autograd.grad(
            p.imitation_loss({k: v[i : i + 1] for k, v in seen.items()}, target[i : i + 1]).sum(), p.head.queries
        )[0]
        for i in range(3)
    ]
    assert torch.allclose(whole, sum(parts), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_padding_beside_longer_instructions_is_not_looked_at(head):
    p, seen = policy(head=head, horizon=2), observation()
    seen["instruction"] = ["go", "go there " * 4, "go"]
    trace = tensors(p.act(seen, rng=rng()).trace)
    first, own = ({k: v[:1] for k, v in tree.items()} for tree in (tensors(seen), trace))
    alone = p.log_prob(first, None, own)[0]
    assert torch.allclose(alone, p.log_prob(tensors(seen), None, trace)[0][:1], atol=1e-4)


def test_bf16_trunk():
    p, seen = policy(dtype="bf16"), observation()
    taken = p.act(seen, rng=rng())
    log_prob, _ = p.log_prob(tensors(seen), None, tensors(taken.trace))
    assert np.isfinite(taken.log_prob).all() and np.abs(log_prob.detach().numpy() - taken.log_prob).max() < 0.2


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_under_autocast(head):
    """What a learner with precision bf16 computes is near what was computed in float32."""
    p, seen = policy(head=head), observation()
    taken = p.act(seen, rng=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob, _ = p.log_prob(tensors(seen), None, tensors(taken.trace))
    assert log_prob.dtype == torch.float32
    assert np.abs(log_prob.detach().numpy() - taken.log_prob).max() < 0.3


def test_equal_seeds_give_equal_bits():
    one, two = policy(seed=3), policy(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert same(one.act(observation(), rng=rng(4)), two.act(observation(), rng=rng(4)))


# --- images and prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_our_pixels_equal_the_models_own(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8))
    qwen, _ = tiny_vlm(TinyVLMConfig(kind="qwen2_5_vl"), rng=rng())
    own = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1, "longest_edge": 10**6}
    )
    names = ["pixel_values", "image_grid_thw"]
    ours, theirs = (Pixels(qwen.config, names=names, processor=q)(images) for q in (None, own))
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-5)  # multiples of the unit: no resizing
    gemma, _ = tiny_vlm(TinyVLMConfig(kind="paligemma"), rng=rng())
    own = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    ours, theirs = (Pixels(gemma.config, names=["pixel_values"], processor=q)(images) for q in (None, own))
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() <= 2.1 / 127.5  # they may round by one level


@given(
    st.lists(st.text("abc ", max_size=8), min_size=1, max_size=4), st.lists(st.integers(1, 5), min_size=1, max_size=3)
)
@settings(max_examples=30, deadline=None)
def test_prompts_hold_a_place_for_every_feature(instructions, counts):
    prompts = PROMPTS()
    ids, mask = prompts.encode(instructions, counts)
    assert ((ids == prompts.image_token) & mask).sum() == len(instructions) * sum(counts)
    assert (np.diff(mask.astype(int), axis=1) >= 0).all() and mask[:, -1].all()  # padding is on the left
    for row, text in enumerate(instructions):
        alone = prompts.encode([text], counts)[0][0]
        assert np.array_equal(ids[row][mask[row]], alone)


def PROMPTS(cache=[]):  # noqa: B006, N802
    if not cache:
        model, tokenizer = tiny_vlm(rng=rng())
        layout = VLM(model, tokenizer).layout
        cache.append(
            Prompts(
                tokenizer, image_token=model.config.image_token_id, layout=layout, template="{images}{instruction}."
            )
        )
    return cache[0]


@given(st.floats(-1, 1), st.integers(2, 300))
@settings(max_examples=50, deadline=None)
def test_a_bin_is_within_half_its_width(value, bins):
    head = HEAD()
    head.bins = bins
    token = head.quantise(torch.tensor(value))
    assert 0 <= int(token) < bins and abs(float(head.centres(token)) - value) <= 1 / bins + 1e-5


def HEAD(cache=[]):  # noqa: B006, N802
    if not cache:
        cache.append(policy().head)
    return cache[0]


# --- frozen towers ---------------------------------------------------------------------------------------------------


def test_features_of_a_frozen_tower_are_computed_once():
    frozen, trained = policy(freeze_vision=True), policy()
    seen = observation(4)
    seen["image/front"][1] = seen["image/front"][0]
    for _ in range(2):
        assert same(frozen.act(seen, rng=rng()), trained.act(seen, rng=rng()))
    assert frozen.vlm.cache.computed == 3 + 4 and trained.vlm.cache.computed == 0


def test_features_are_forgotten_when_weights_are_loaded():
    p, other, seen = policy(train="head"), policy(train="head", seed=1), observation()
    before = p.act(seen, greedy=True)
    p.load_state_dict(other.state_dict())
    assert same(p.act(seen, greedy=True), other.act(seen, greedy=True)) and not same(
        before, other.act(seen, greedy=True)
    )


def test_the_cache_keeps_to_its_limit():
    cache = FeatureCache(limit=3 * 4)
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    for _ in range(2):
        assert torch.equal(cache(images, lambda x: x.float().flatten(1)).flatten(), torch.arange(5.0))
    assert cache.used == 12 and cache.computed == 5 + 2  # three of the five are still there the second time
    cache(images[:2], lambda x: x.float().flatten(1))
    assert cache.computed == 7


# --- scripts for accelerators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo_tokens", "vla_ppo", "train_memory"])
def test_gpu_script_runs_tiny_on_the_cpu(name):
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}"]
    tiny = subprocess.run([*command, "--tiny"], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(tiny.stdout.strip().splitlines()[-1])
    assert found["name"] == name and found["tiny"] and all(np.isfinite(v) for v in found["results"].values())
    if not torch.cuda.is_available():
        skipped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "needs a CUDA device" in skipped.stdout
