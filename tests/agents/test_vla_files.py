"""Vision-language-action policies on disk: what travels with the weights, and what is refused."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.agents.models.tiny_vlm import IMAGE, tiny_vlm
from embodied_rft.agents.models.vlm import VLM
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions
from embodied_rft.pools.protocol import fields_of
from tests.lab.helpers_vla import IMAGES, KINDS, SPACE, STEP, chunks, observation, policy, rng, tensors

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_the_same_policy(kind, tmp_path):
    p = policy(kind, "flow", train="lora")
    with torch.no_grad():
        for name, parameter in p.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02)
    p.save_pretrained(tmp_path)
    q = policy(head="flow", model=str(tmp_path), seed=7)
    assert not any("lora_" in name for name, _ in q.named_parameters())  # merged
    a, b = p.act(observation(), greedy=True), q.act(observation(), greedy=True)
    assert np.allclose(a.action, b.action, atol=1e-4)
    assert not any(path.name.endswith(".part") for path in tmp_path.iterdir())


def test_a_folder_with_an_image_processor_uses_it(tmp_path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, tokenizer = tiny_vlm(rng=rng())
    size = {"shortest_edge": 1, "longest_edge": 10**6}
    for part in (model, tokenizer, Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size)):
        part.save_pretrained(tmp_path)
    p = policy(model=str(tmp_path), space=gym.spaces.Dict({k: SPACE[k] for k in ("image/front", "instruction")}))
    assert type(p.vlm.processor).__name__ == "Qwen2VLImageProcessorPil"
    processed = p.act(observation(), greedy=True)
    p.vlm.pixels.processor = None
    assert np.allclose(processed.log_prob, p.act(observation(), greedy=True).log_prob, atol=1e-4)


def fitted(tmp_path, **options):
    """A policy with statistics of its data, and a folder of it."""
    p = policy(statistics="min_max", **options)
    p.codec.statistics.fit({"action": chunks(50)})
    p.save_pretrained(tmp_path)
    return p


def test_statistics_travel_with_the_folder(tmp_path):
    p = fitted(tmp_path)
    q = policy(model=str(tmp_path), statistics="min_max", seed=5)
    assert q.codec.statistics.hash == p.codec.statistics.hash
    assert np.allclose(p.act(observation(), greedy=True).action, q.act(observation(), greedy=True).action, atol=1e-5)


def test_statistics_are_taken_from_the_buffer():
    p = policy(statistics="min_max", normalize=True)
    with pytest.raises(ValueError, match="no statistics"):
        p.act(observation(), greedy=True)
    with pytest.raises(ValueError, match="no statistics"):
        p.save_pretrained(Path("never"))
    schema = Schema(fields_of(SPACE), fields_of(STEP)["observation"], dict(p.trace_fields), p.num_units)
    buffer, seen, never = Buffer(schema, 100), observation(8), np.zeros(8, bool)
    with pytest.raises(ValueError, match="no data"):
        p.fit_statistics(buffer)
    action = chunks(8).numpy()
    taken = Decisions(action, np.full((8, p.num_units), np.nan, np.float32))
    buffer.add(
        np.arange(8), seen, taken, np.ones(8, np.float32), ~never, never, group=0, seed=0, step=0, version=0, source=0
    )
    buffer.close(np.arange(8), seen)
    p.fit_statistics(buffer)
    low, high = action.min(0), action.max(0)
    assert np.allclose(p.codec.statistics.denormalise("action", torch.ones(2)).numpy(), high, atol=1e-5)
    decided = p.act(observation(), rng=rng()).action
    assert (decided >= low - 1e-5).all() and (decided <= high + 1e-5).all()


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match):
        function(*args, **kwargs)


def test_statistics_of_another_robot_are_refused(tmp_path):
    fitted(tmp_path)
    other = gym.spaces.Box(np.float32([-1, -1]), np.float32([1, 1]))
    refused("another robot", policy, model=str(tmp_path), statistics="min_max", step=other)
    refused("another robot", policy, model=str(tmp_path), statistics="mean_std")


def test_a_folder_without_its_statistics_is_refused(tmp_path):
    policy().save_pretrained(tmp_path)
    refused("no statistics", policy, model=str(tmp_path), statistics="min_max")
    assert policy(model=str(tmp_path), statistics="min_max", fresh_head=True).codec.statistics is not None


@pytest.mark.parametrize(
    "options, match",
    [
        ({"kind": "smolvlm"}, "model_type is 'qwen2_5_vl', this one's is 'smolvlm'"),
        ({"head": "flow"}, "head is 'tokens'"),
        ({"horizon": 2}, "horizon is 1"),
        ({"model": {"tiny": {"hidden_size": 32}}}, "hidden_size is 64"),
        ({"tokens": {"bins": 16}}, "bins is 256"),
        ({"images": ["image/wrist", "image/front"]}, "images is"),
        ({"step": gym.spaces.Box(-1, 1, (3,))}, "action_dim is 2, this one's is 3"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(options, match):
    weights = policy().state_dict()
    other = policy(**options)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    refused(match, other.load_state_dict, weights)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("head", "saved", "own", "match"),
    [
        ("flow", {"width": 32}, {"width": 64}, "width is 32"),
        ("flow", {"num_heads": 2}, {"num_heads": 4}, "num_heads is 2"),  # the shapes are equal, the meaning is not
        ("parallel", {"hidden": [8]}, {"hidden": [16]}, "hidden is"),
    ],
)
def test_a_head_of_another_shape_is_refused(head, saved, own, match, tmp_path):
    policy(head=head, **{head: saved}).save_pretrained(tmp_path)
    refused(match, policy, model=str(tmp_path), head=head, **{head: own})


def test_damaged_statistics_are_refused_and_change_nothing(tmp_path):
    """Before a single weight is read."""
    weights = fitted(tmp_path).state_dict()
    weights["codec.statistics.center/action"] = weights["codec.statistics.center/action"] + 0.1
    fresh = policy(statistics="min_max", seed=3)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    refused("do not match their own hash", fresh.load_state_dict, weights)
    other = policy(statistics="min_max", seed=4)
    other.codec.statistics.fit({"action": chunks(50, seed=9)})
    refused("differ from those", other.load_state_dict, fitted(tmp_path).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_another_tokenizer_beside_the_weights_is_refused(tmp_path):
    """One of the same size whose ids mean other texts: nothing but the head's file can tell."""
    policy().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    refused("its tokenizer is", policy, model=str(tmp_path))


def test_an_image_processor_of_another_model_is_refused(tmp_path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, tokenizer = tiny_vlm(rng=rng())
    size = {"shortest_edge": 1, "longest_edge": 10**6}
    for part in (model, tokenizer, Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)):
        part.save_pretrained(tmp_path)
    p = policy(model=str(tmp_path))
    refused("the vision tower reads", p.act, observation(), greedy=True)


def test_images_of_another_size_or_number_are_refused():
    p, seen = policy(), observation()
    refused("was made for", p.act, seen | {"image/front": seen["image/front"][:, :16]}, greedy=True)
    images = [torch.from_numpy(seen["image/front"])]
    refused("one image of each camera", p.vlm.read, images, ["go"] * 2)
    refused("one image of each camera", p.vlm.read, images, ["go"] * 4)


def test_a_text_model_is_refused(tmp_path):
    from embodied_rft.agents.models.tiny_lm import tiny_causal_lm

    for part in tiny_causal_lm(rng=rng()):
        part.save_pretrained(tmp_path)
    refused("cannot be loaded as a vision-language model", policy, model=str(tmp_path))
    refused("does not exist", policy, model=str(tmp_path / "nothing"))
    refused("tiny", policy, model={"small": {}})


def test_a_tokenizer_of_another_model_is_refused():
    from embodied_rft.agents.models.tiny_lm import tiny_tokenizer

    model, tokenizer = tiny_vlm(rng=rng())
    refused("do not belong together", VLM, model, tiny_tokenizer())
    small, _ = tiny_vlm(rng=rng())
    small.resize_token_embeddings(200)
    refused("token ids up to", VLM, small, tokenizer)


def test_images_and_image_places_must_match():
    p = policy()
    refused("has 3 places for images", p.act, observation(1) | {"instruction": [f"find {IMAGE}"]}, greedy=True)
    refused("exactly once", policy, prompt="{instruction}")
    refused("exactly once", policy, prompt="{images}{images}{instruction}")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"flow": {"num_steps": 2}}, "no effect with head 'tokens'"),
        ({"train": "head", "freeze_vision": True}, "freeze_vision True has no effect"),
        ({"horizon": 2, "execute": 3}, "1 <= execute <= horizon"),
        ({"images": ["image/fron"]}, "did you mean 'image/front'"),
        ({"state": ["stat"]}, "did you mean 'state'"),
        ({"tokens": {"bins": 1}}, "bins >= 2"),
        ({"head": "parallel", "parallel": {"min_std": 1.0}}, "min_std <= initial_std"),
        ({"head": "flow", "flow": {"width": 30}}, "multiple of num_heads"),
        ({"model": {"tiny": {"hidden_size": 60}}}, "multiple of twice"),
        ({"model": {"tiny": {"vocab_size": 10}}}, "smaller than the tokenizer"),
    ],
)
def test_options_that_cannot_work_are_refused(options, match):
    refused(match, policy, **options)


def test_observations_that_do_not_fit_are_refused():
    refused("needs an image", policy, space=gym.spaces.Dict({"state": SPACE["state"]}), instruction="go")
    refused("set the option instruction", policy, space=gym.spaces.Dict({"image/front": IMAGES}))
    seen = observation()
    del seen["image/wrist"]
    refused("did you mean 'image/front'|has no 'image/wrist'", policy().act, seen, greedy=True)
    refused("uint8 is expected", policy().vlm.pixels, torch.zeros(1, 32, 32, 3))
    refused("needs its chain", policy(head="flow").log_prob, tensors(observation()), chunks(), {})
