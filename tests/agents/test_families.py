"""Models of many families, from a folder that Hugging Face wrote: the same promises for each, or a refusal."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.data import Ragged
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.policy import build_policy, tune
from tests.lab.draws import generator as rng
from tests.lab.families import DECODERS, HYBRIDS, TEXT, VISION, write_decoder, write_vlm

REPLY = gym.spaces.Text(200)
SPACE = gym.spaces.Dict({"prompt": REPLY})
LONG = "a prompt that is longer than any window of these models: 0123456789"
PROMPTS = ["a", LONG, "3+4=", LONG, "3+4=", "xy", LONG, LONG, LONG[:-3] + "!"]
SEEN = gym.spaces.Dict(
    {
        "a": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8),
        "b": gym.spaces.Box(0, 255, (16, 24, 3), np.uint8),
        "prompt": gym.spaces.Text(40),
    }
)


def language(folder, **options):
    spec = {"id": "language", "model": str(folder), "prompt": "plain", "max_new_tokens": 8, **options}
    return build_policy(spec, SPACE, REPLY, rng())


def gradient(policy, trace, rows):
    """Of a random weighting of what is said of some rows, as one vector, and the log-probabilities."""
    policy.zero_grad()
    whole = torch.randn((len(PROMPTS), 8), generator=rng(5))
    taken = []
    for part in rows:
        some = {"reply": trace["reply"].take(part)}
        log_prob, entropy = policy.log_prob({"prompt": [PROMPTS[i] for i in part]}, [""] * len(part), some)
        weight = whole[part][:, : log_prob.shape[1]]
        ((log_prob + 0.1 * entropy) * weight).sum().backward()
        taken.append(log_prob.detach())
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), taken


def far(given, expected):
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind, tmp_path):
    write_decoder(kind, tmp_path / "theirs")
    policy = language(tmp_path / "theirs")
    taken = policy.act({"prompt": PROMPTS}, rng=rng(1))
    every = [np.arange(len(PROMPTS))]
    shared, (log_prob,) = gradient(policy, taken.trace, every)
    np.testing.assert_allclose(log_prob.numpy(), taken.log_prob.pad()[0], atol=1e-5)
    pieces, _ = gradient(policy, taken.trace, [np.array([0, 3]), np.array([1, 2, 4]), np.array([5, 6, 7, 8])])
    policy.config.share_prefix = False
    dense, (alone,) = gradient(policy, taken.trace, every)
    policy.config.share_prefix = True
    torch.testing.assert_close(alone, log_prob, rtol=0, atol=1e-5)
    assert far(shared, dense) < 1e-5 and far(pieces, dense) < 1e-5
    greedy = policy.act({"prompt": PROMPTS}, greedy=True)
    for ids, reply in list(zip(policy.prompt_ids({"prompt": PROMPTS}), greedy.trace["reply"], strict=True))[:3]:
        assert np.array_equal(generated(policy, ids), reply)
    fine_tuned(policy, greedy, taken.trace, tmp_path / "ours")


def generated(policy, ids, **more):
    """What the library says by itself, of tokens that have a text."""
    ids = torch.from_numpy(np.array(ids))[None] if not isinstance(ids, torch.Tensor) else ids
    said = policy.lm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=policy.config.max_new_tokens,
        do_sample=False,
        suppress_tokens=list(range(len(policy.lm.tokenizer), TEXT["vocab_size"])),
        eos_token_id=sorted(policy.lm.eos),
        pad_token_id=0,
        **more,
    )
    return said[0, ids.shape[1] :].numpy()


def fine_tuned(policy, greedy, trace, folder):
    """Adapters start as nothing, they alone have a gradient, and what they learn is saved and read."""
    tune(policy, "lora", rng=rng())
    again = policy.act({"prompt": PROMPTS}, greedy=True)
    np.testing.assert_allclose(again.log_prob.values, greedy.log_prob.values, atol=1e-5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=rng(3))
    policy.zero_grad()
    log_prob, _ = policy.log_prob({"prompt": PROMPTS}, [""] * len(PROMPTS), trace)
    log_prob.sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all("lora_" in name for name in moved)
    policy.save_pretrained(folder)
    loaded, _ = language(folder).log_prob({"prompt": PROMPTS}, [""] * len(PROMPTS), trace)
    torch.testing.assert_close(loaded, log_prob, rtol=0, atol=1e-4)
    if policy.model.get_output_embeddings().weight is not policy.model.get_input_embeddings().weight:
        tune(policy, "head", rng=rng())
        assert sum(p.requires_grad for p in policy.parameters()) in (1, 2)  # and its bias


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt_oss"])
def test_rounding_is_no_reason_to_refuse(kind, tmp_path):
    write_decoder(kind, tmp_path)
    policy = language(tmp_path, dtype="bf16")
    taken = policy.act({"prompt": PROMPTS}, rng=rng(1))
    log_prob, _ = policy.log_prob({"prompt": PROMPTS}, taken.action, taken.trace)
    np.testing.assert_allclose(log_prob.detach().numpy(), taken.log_prob.pad()[0], atol=0.2)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_decoders_without_keys_and_values_are_refused(kind, tmp_path):
    write_decoder(kind, tmp_path)
    with pytest.raises(ValueError, match=r"is refused: its layers of kind linear_attention .*\(Llama"):
        language(tmp_path)


def test_a_vision_language_model_may_answer_texts(tmp_path):
    write_vlm("qwen3_vl", tmp_path)
    policy = language(tmp_path, train="lora")
    taken = policy.act({"prompt": PROMPTS}, rng=rng(1))
    log_prob, _ = policy.log_prob({"prompt": PROMPTS}, taken.action, taken.trace)
    np.testing.assert_allclose(log_prob.detach().numpy(), taken.log_prob.pad()[0], atol=1e-5)
    log_prob.sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in policy.named_parameters())


# --- with images -----------------------------------------------------------------------------------------------------


def seen(count=3):
    numbers = np.random.default_rng(0)
    images = {k: numbers.integers(0, 256, (count, *SEEN[k].shape)).astype(np.uint8) for k in "ab"}
    return {**images, "prompt": ["open", "close the door", "push"][:count]}


def vision(folder, id="language", action=REPLY, space=SEEN, **options):
    talks = {"max_new_tokens": 6, "prompt": "plain"}
    more = talks if id == "language" else {"instruction": "go", "prompt": "{images}{instruction}"}
    spec = {"id": id, "model": str(folder), **more, **options}
    return build_policy(spec, space, action, rng())


@pytest.mark.parametrize("kind", VISION)
def test_vision_language_models(kind, tmp_path):
    write_vlm(kind, tmp_path / "theirs")
    if kind == "qwen3_5":
        with pytest.raises(ValueError, match="layers of kind linear_attention keep a state"):
            vision(tmp_path / "theirs")
        acts(tmp_path / "theirs", seen(), {**seen(), **as_tensors({k: seen()[k] for k in "ab"})})
        return
    policy, looked = vision(tmp_path / "theirs"), seen()
    tensors = {**looked, **as_tensors({k: looked[k] for k in "ab"})}
    taken = policy.act(looked, rng=rng(1))
    log_prob, _ = policy.log_prob(tensors, taken.action, taken.trace)
    np.testing.assert_allclose(log_prob.detach().numpy(), taken.log_prob.pad(0)[0], atol=1e-5)
    apart = [policy.log_prob(*row(tensors, taken.trace, i))[0].detach()[0] for i in range(3)]
    for own, whole in zip(apart, log_prob.detach(), strict=True):  # padded = alone
        torch.testing.assert_close(own, whole[: len(own)], rtol=0, atol=1e-5)
    read_once(policy, tensors)
    assert policy.vlm._compared  # with the model's own forward pass, which also has to say the same:
    one = vision(tmp_path / "theirs", space=gym.spaces.Dict({k: SEEN[k] for k in ("a", "prompt")}))
    greedy = one.act({k: looked[k] for k in ("a", "prompt")}, greedy=True)
    ids, given = theirs(one, looked, 1)
    assert np.array_equal(greedy.trace["reply"].row(1), generated(one, ids, **given))
    tune(policy, "lora", rng=rng())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=rng(3))
    log_prob, _ = policy.log_prob(tensors, None, taken.trace)
    policy.save_pretrained(tmp_path / "ours")
    loaded, _ = vision(tmp_path / "ours").log_prob(tensors, None, taken.trace)
    torch.testing.assert_close(loaded, log_prob, rtol=0, atol=1e-4)
    acts(tmp_path / "theirs", looked, tensors)


def read_once(policy, tensors):
    """Groups of one prompt: with what they share computed once, values and gradients stay as they are."""
    group = [0, 1, 0, 2, 0, 1]
    many = {k: [v[i] for i in group] if isinstance(v, list) else v[group] for k, v in tensors.items()}
    numbers, found = np.random.default_rng(0), []
    replies = Ragged.of([numbers.integers(5, 200, n) for n in (4, 1, 3, 2, 5, 5)], dtype=np.int64)
    for policy.config.share_prefix in (False, True):
        policy.zero_grad()
        before = policy.usage.computed
        log_prob, entropy = policy.log_prob(many, None, {"reply": replies})
        (log_prob[:, ::2] + 0.1 * entropy[:, 1:2]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((log_prob.detach(), gradient, policy.usage.computed - before))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert far(found[0][1], found[1][1]) < 1e-5 and found[1][2] < found[0][2]
    arrays = {k: v if isinstance(v, list) else v.numpy() for k, v in many.items()}
    said = policy.act(arrays, greedy=True)
    assert said.action == [policy.act(seen(), greedy=True).action[i] for i in group]


def row(tensors, trace, number):
    one = {k: v[number : number + 1] for k, v in tensors.items()}
    return one, [""], {"reply": trace["reply"].take(np.array([number]))}


def theirs(policy, looked, number):
    """Ids and keyword arguments of one row, as the library's own processor would give them."""
    vlm, image = policy.vlm, torch.from_numpy(looked["a"][number : number + 1])
    ids = torch.from_numpy(policy.prompt_ids({k: looked[k] for k in ("a", "prompt")}).row(number))[None]
    ids = torch.where(ids < len(vlm.model.get_input_embeddings().weight), ids, vlm.prompts.image_token)
    given, kinds = vlm.pixels(image), (ids == vlm.prompts.image_token).long()
    if vlm.layout.blocks == "images":
        given["token_type_ids"] = kinds
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = kinds
    return ids, given


def acts(folder, looked, tensors):
    """As a robot's policy, too: what it did is as likely as it says."""
    policy = vision(folder, "vla", gym.spaces.Box(-1, 1, (2,), np.float32), tokens={"bins": 9})
    taken = policy.act(looked, rng=rng(1))
    log_prob, _ = policy.log_prob(tensors, None, as_tensors(taken.trace))
    np.testing.assert_allclose(log_prob.detach().numpy(), taken.log_prob, atol=1e-5)


def test_a_model_that_reads_images_in_an_unknown_way_is_refused(tmp_path, monkeypatch):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Model

    write_vlm("gemma3", tmp_path)
    policy = vision(tmp_path)
    policy.vlm.layout = type(policy.vlm.layout)()  # as if nobody knew that its images look ahead
    with pytest.raises(ValueError, match="in a way that is not known here"):
        policy.act(seen(), greedy=True)

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(Gemma3Model, "forward", fail)
    with pytest.raises(ValueError, match="does not read an image and a text"):
        policy.act(seen(), greedy=True)
