"""The language agent: act and log_prob agree, what is sampled is trained, files, LoRA, bad tokenizers, bad prompts."""

import copy
import itertools
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from embodied_rft.agents.models.causal_lm import CausalLM, load_model
from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm, tiny_tokenizer
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.plans import Drawn
from embodied_rft.data import Decisions, Ragged, Source, Trajectory
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.policy import Values, able
from tests.lab.draws import generator as rng

TEXT = gymnasium.spaces.Text(200)
SPACE = gymnasium.spaces.Dict({"prompt": TEXT})
PROMPTS = ["3+4=", "3+4=", "1+1=", "a much longer prompt than the others", "3+4=", "1+1=", "x"]


def make(space=SPACE, seed=0, **options):
    tiny = {"hidden_size": 32, **options.pop("tiny", {})}
    spec = {"id": "language", "model": {"tiny": tiny}, "max_new_tokens": 12, **options}
    return build_agent(spec, space, TEXT, rng(seed))


def gradient(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


OPTIONS = [
    {},
    {"prompt": "plain"},
    {"system": "Be brief."},
    {"temperature": 0.5, "top_k": 30, "top_p": 0.8},
    {"train": "lora", "lora": {"rank": 4}},
    {"train": "head"},
    {"gradient_checkpointing": True},
    {"share_prefix": False},
    {"token_chunk": 5},
    {"tiny": {"kind": "llama", "vocab_size": 300}},
    {"tiny": {"kind": "gpt2"}},
    {"tiny": {"tie_embeddings": True}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_act_and_log_prob_agree(options):
    policy = make(**options).policy
    taken = policy.act({"prompt": PROMPTS}, rng=rng(1))
    log_prob, entropy = policy.log_prob({"prompt": PROMPTS}, taken.action, taken.trace)
    expected, mask = taken.log_prob.pad()
    np.testing.assert_allclose(log_prob.detach().numpy(), expected, atol=1e-5)
    assert log_prob.shape == entropy.shape == mask.shape
    assert (log_prob.detach().numpy()[~mask] == 0).all() and (entropy.detach().numpy()[mask] > 0).all()
    assert (taken.trace["reply"].lengths == taken.log_prob.lengths).all()
    eos = policy.tokenizer.eos_token_id
    ended = np.array([row[-1] == eos for row in taken.trace["reply"]])
    assert (taken.trace["cut"] == ~ended).all() and set(policy.trace_fields) == set(taken.trace)
    assert taken.trace["reply"].values.max() < len(policy.tokenizer)  # unused rows of the embedding are never drawn


def test_the_same_generator_gives_the_same_replies():
    policy = make().policy
    first, again, other = (policy.act({"prompt": PROMPTS}, rng=rng(seed)) for seed in (1, 1, 2))
    assert first.action == again.action and first.action != other.action
    assert (first.log_prob.values == again.log_prob.values).all()
    greedy, repeated = (policy.act({"prompt": PROMPTS}, greedy=True) for _ in range(2))
    assert greedy.action == repeated.action and greedy.action[0] == greedy.action[1] == greedy.action[4]
    with pytest.raises(ValueError, match="rng"):
        policy.act({"prompt": PROMPTS})


def test_global_generator_is_left_alone():
    state = torch.get_rng_state()
    policy = make(train="lora").policy
    policy.act({"prompt": PROMPTS}, rng=rng(1))
    assert torch.equal(state, torch.get_rng_state())
    again = make(train="lora").policy
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_what_was_sampled_is_scored_not_its_text():
    """Two token sequences with one text have two probabilities; the ids in the trace decide."""
    policy = make().policy
    policy.tokenizer = tiny_tokenizer(merges=20, corpus=["the cat the cat the cat"])
    replies = Ragged.of([[100, 101, 1], [100, 1]], dtype=np.int64)
    trace = {"reply": replies, "cut": np.zeros(2, bool)}
    log_prob, _ = policy.log_prob({"prompt": ["x", "x"]}, ["same", "same"], trace)
    assert log_prob[0, 2] != 0 and log_prob[1, 2] == 0 and log_prob[0, 0] == log_prob[1, 0]


OBJECTIVES = {
    "bc": {"batch_size": 8},
    "raft": {"batch_size": 8},
    "dpo": {"batch_size": 8},
    "grpo": {"num_epochs": 2, "kl_weight": 0.1},
    "ppo": {"num_epochs": 2, "correction": {}},
}


@pytest.mark.parametrize("id", OBJECTIVES)
def test_no_objective_tokenises_a_reply_again(id):
    """Random bytes are often no text, so their ids cannot be had back from what they decode to."""
    agent = make()
    policy = agent.policy
    buffer, taken = filled_buffer(policy)
    again = [policy.dialogue.reply(text).tolist() for text in taken.action]
    assert sum(a != ids.tolist() for a, ids in zip(again, taken.trace["reply"], strict=True)) > 4

    def never(text):
        raise AssertionError(f"the reply {text!r} is tokenised")

    policy.dialogue.reply = never
    objective = build_objective({"id": id, **OBJECTIVES[id]})
    objective.setup(agent, rng())
    before = [p.detach().clone() for p in policy.parameters()]
    updates = {"num_updates": 2} if isinstance(objective.reading, Drawn) else {}
    Learner(agent, objective).learn(buffer, np.random.default_rng(0), **updates)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_imitation_is_of_the_sampled_ids():
    agent = make()
    buffer, taken = filled_buffer(agent.policy)
    objective = build_objective("bc")
    batch = buffer.batch(buffer.rows())
    loss, _ = objective.losses["policy"](agent, replace(batch, num_decisions=len(batch)), rng())
    scores = taken.log_prob.values
    means = [scores[a:b].mean() for a, b in itertools.pairwise(taken.log_prob.offsets)]
    assert float(loss.detach()) == pytest.approx(-np.mean(means), rel=1e-4)


def test_decisions_without_a_trace_are_scored_by_their_text():
    """A buffer keeps an unknown trace as empty ids; the rows beside it keep theirs."""
    policy = make(prompt="plain").policy
    shown, said = {"prompt": ["1+1=", "2+2=", "3"]}, ["2", "4", "x"]
    whole = policy.retrace(shown, said)
    whole["reply"] = Ragged.of([whole["reply"].row(0), [70, 71, 72], whole["reply"].row(2)], dtype=np.int64)
    partly = {"reply": Ragged.of([[], whole["reply"].row(1), []], dtype=np.int64)}
    for some in (partly, {name: part.take(np.array([1, 0, 2])) for name, part in partly.items()}):
        order = [0, 1, 2] if some is partly else [1, 0, 2]
        texts = {"prompt": [shown["prompt"][i] for i in order]}, [said[i] for i in order]
        log_prob, _ = policy.log_prob(*texts, some)
        expected, _ = policy.log_prob(*texts, {name: part.take(np.array(order)) for name, part in whole.items()})
        torch.testing.assert_close(log_prob, expected)
        torch.testing.assert_close(policy.imitation_loss(*texts, trace=some)[order.index(2)], -expected[2, :2].mean())


def filled_buffer(policy, count=8, groups=2, seed=3):
    """One-turn episodes of `groups` prompts, rewards drawn at random."""
    schema = Schema(
        {
            "prompt": policy_text(),
        },
        policy_text(),
        dict(policy.trace_fields),
        units=None,
    )
    buffer = Buffer(schema, 64)
    prompts = [PROMPTS[2 + i % groups] for i in range(count)]
    taken = policy.act({"prompt": prompts}, rng=rng(seed))
    streams, flags = np.arange(count), np.ones(count, bool)
    reward = np.random.default_rng(seed % 3).random(count).astype(np.float32)
    numbers = {"group": streams % groups, "seed": streams % groups, "step": 0, "version": 1, "source": Source.ONLINE}
    buffer.add(streams, {"prompt": prompts}, taken, reward, flags, ~flags, **numbers)
    buffer.close(streams, {"prompt": prompts})
    return buffer, taken


def policy_text():
    from embodied_rft.pools.protocol import field_of

    return field_of("text", TEXT)


def test_through_buffer_and_learner():
    """What comes out of the buffer is scored as it was sampled, and micro-batches add up to the batch."""
    agent = make()
    buffer, taken = filled_buffer(agent.policy)
    objective = build_objective({"id": "grpo", "num_epochs": 1, "batch_size": 8})
    objective.setup(agent, rng())
    objective.annotate(agent, buffer, buffer.rows(), rng())
    batch = buffer.batch(buffer.rows())
    batch.num_episodes = len(np.unique(batch.columns["episode"]))  # as a plan counts them
    log_prob, _ = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
    difference = torch.where(batch.mask, log_prob - batch.log_prob, 0.0)
    assert difference.abs().max() < 1e-5  # the ratio of the first epoch is 1
    assert [row.tolist() for row in batch.trace["reply"]] == [row.tolist() for row in taken.trace["reply"]]

    weights = []
    for pieces in (None, 3):
        copied = copy.deepcopy(agent)
        learner = Learner(copied, objective, LearnerConfig(micro_batch=pieces, learning_rate=1e-2))
        learner.update(batch, rng())
        weights.append(torch.cat([p.detach().flatten() for p in copied.policy.parameters()]))
    before = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
    moved = weights[0] != before
    assert moved.float().mean() > 0.2
    # Adam turns rounding of vanishing gradients into whole steps: compare where the gradient is not vanishing.
    assert ((weights[0] - weights[1]).abs() < 1e-4).float().mean() > 0.99


def test_cut_replies_are_counted_and_learned_from_or_not():
    """The rule of `cut`: a cut reply is credited like any other, or left out of every batch."""
    agent = make(max_new_tokens=150)  # so that about half of the replies end by themselves
    read = {}
    for cut in ("keep", "drop"):
        buffer, taken = filled_buffer(agent.policy)
        objective = build_objective({"id": "ppo", "credit": "return", "num_epochs": 1, "batch_size": 5, "cut": cut})
        objective.setup(agent, rng())
        objective.annotate(agent, buffer, buffer.rows(), rng())
        batches = list(objective.reading.batches(buffer, np.random.default_rng(0), agent.version.item()))
        read[cut] = np.concatenate([batch.trace["cut"].numpy().ravel() for batch in batches])
    assert len(read["keep"]) == len(taken.trace["cut"]) and read["keep"].sum() == taken.trace["cut"].sum() > 0
    assert len(read["drop"]) == (~taken.trace["cut"]).sum() > 0 and not read["drop"].any()


def test_learning_is_bit_equal_when_repeated():
    ends = []
    for _ in range(2):
        agent = make(seed=4)
        buffer, _ = filled_buffer(agent.policy)
        objective = build_objective({"id": "grpo", "num_epochs": 2, "batch_size": 8})
        objective.setup(agent, rng())
        Learner(agent, objective, LearnerConfig(learning_rate=1e-3)).learn(buffer, np.random.default_rng(0))
        ends.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
    assert torch.equal(*ends)


def test_sharing_and_checkpointing_leave_the_gradient_as_it_is():
    plain, shared, twice = (
        make(**o).policy for o in ({"share_prefix": False}, {}, {"gradient_checkpointing": True, "token_chunk": 4})
    )
    prompts = ["a long prompt that is worth sharing between the members of its group"] * 6 + PROMPTS
    taken = plain.act({"prompt": prompts}, rng=rng(1))
    reference = None
    for policy in (plain, shared, twice):
        log_prob, entropy = policy.log_prob({"prompt": prompts}, taken.action, taken.trace)
        (log_prob.sum() + (0.1 * entropy).sum()).backward()
        flat = torch.cat([g.flatten() for g in gradient(policy).values()])
        reference = flat if reference is None else reference
        assert (flat - reference).norm() < 1e-5 * reference.norm()


def test_lora_changes_nothing_but_adapters():
    agent = make(train="lora", lora={"rank": 2, "alpha": 4})
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    assert 0 < sum(p.numel() for p in agent.trainable("policy")) < 0.2 * sum(p.numel() for p in before.values())
    buffer, _ = filled_buffer(agent.policy)
    objective = build_objective({"id": "grpo", "num_epochs": 3, "batch_size": 8})
    objective.setup(agent, rng())
    Learner(agent, objective, LearnerConfig(learning_rate=1e-2)).learn(buffer, np.random.default_rng(0))
    changed = {name for name, p in agent.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_head_only_changes_nothing_but_the_head():
    policy = make(train="head").policy
    policy.imitation_loss({"prompt": ["a"]}, ["b"]).sum().backward()
    assert set(gradient(policy)) == {"model.lm_head.weight"}
    with pytest.raises(ValueError, match="also its input embedding"):
        make(train="head", tiny={"tie_embeddings": True})


@pytest.mark.parametrize("options", [{}, {"train": "lora", "lora": {"rank": 4}}], ids=str)
def test_saved_folders_load_by_the_same_path(tmp_path, options):
    policy = make(**options).policy
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=rng(5))
    policy.save_pretrained(tmp_path)
    loaded = build_agent({"id": "language", "model": str(tmp_path), "max_new_tokens": 12}, SPACE, TEXT, rng(9)).policy
    a, b = (p.act({"prompt": PROMPTS}, greedy=True) for p in (policy, loaded))
    assert a.action == b.action
    np.testing.assert_allclose(a.log_prob.values, b.log_prob.values, atol=1e-4)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_library_folder_is_fine_tuned_and_saved_again(tmp_path, kind, train):
    """A folder that Hugging Face wrote, not we: GRPO raises what was rewarded, the result loads there again."""
    from transformers import AutoModelForCausalLM

    source = make(tiny={"kind": kind}).policy
    source.model.save_pretrained(tmp_path / "theirs")
    source.tokenizer.save_pretrained(tmp_path / "theirs")
    spec = {"id": "language", "model": str(tmp_path / "theirs"), "max_new_tokens": 12, "train": train}
    agent = build_agent(spec, SPACE, TEXT, rng())
    np.testing.assert_allclose(
        agent.policy.act({"prompt": PROMPTS}, greedy=True).log_prob.values,
        source.act({"prompt": PROMPTS}, greedy=True).log_prob.values,
        atol=1e-5,
    )
    buffer, _ = filled_buffer(agent.policy)
    objective = build_objective({"id": "grpo", "num_epochs": 4, "batch_size": 24})
    objective.setup(agent, rng())
    Learner(agent, objective, LearnerConfig(learning_rate=3e-3)).learn(buffer, np.random.default_rng(0))
    batch = buffer.batch(buffer.rows())
    with torch.no_grad():
        log_prob, _ = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
    gain = torch.where(batch.mask, log_prob - batch.log_prob, 0.0).sum(1)
    assert (gain * batch.notes["advantage"]).mean() > 0.1
    agent.policy.save_pretrained(tmp_path / "ours")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(saved(ids).logits, agent.policy.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_bf16_weights():
    policy = make(dtype="bf16").policy
    taken = policy.act({"prompt": PROMPTS}, rng=rng(1))
    log_prob, _ = policy.log_prob({"prompt": PROMPTS}, taken.action, taken.trace)
    log_prob.sum().backward()
    assert next(policy.parameters()).dtype == torch.bfloat16 and log_prob.dtype == torch.float32
    assert np.abs(log_prob.detach().numpy() - taken.log_prob.pad()[0]).max() < 0.1


def test_imitation_lowers_its_loss_and_demonstrations_get_traces():
    agent = make(prompt="plain")
    policy = agent.policy
    schema = Schema({"prompt": policy_text()}, policy_text(), dict(policy.trace_fields), units=None)
    buffer = Buffer(schema, 64)
    for prompt, answer in (("1+1=", "2"), ("2+2=", "4"), ("e", "")):
        one = {"prompt": [prompt, prompt]}
        end = Trajectory(one, [answer], np.ones(1, np.float32), "terminated", source=Source.DEMONSTRATION)
        buffer.add_trajectory(end, retrace=policy.retrace)
    batch = buffer.batch(buffer.rows())
    assert [policy.reply_text(row) for row in batch.trace["reply"]] == ["2", "4", ""]
    objective = build_objective({"id": "bc", "batch_size": 3})
    objective.setup(agent, rng())
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-2))
    learner.learn(buffer, np.random.default_rng(0), num_updates=60)
    assert policy.imitation_loss(batch.observation, batch.action).max() < 0.1
    assert policy.act({"prompt": ["1+1=", "2+2=", "e"]}, greedy=True).action == ["2", "4", ""]


def test_a_text_is_tokenised_once():
    policy = make(prompt="plain").policy
    calls = []
    tokenizer = policy.tokenizer
    original = type(tokenizer).__call__
    try:
        type(tokenizer).__call__ = lambda self, *args, **kwargs: calls.append(args) or original(self, *args, **kwargs)
        for _ in range(3):
            policy.imitation_loss({"prompt": ["one", "two"]}, ["a", "a"])
    finally:
        type(tokenizer).__call__ = original
    assert len(calls) == 3  # two prompts, one answer


def test_features_of_prompts():
    policy = make().policy
    encoder = policy.make_encoder(rng=rng())
    features = encoder({"prompt": PROMPTS})
    assert features.shape == (len(PROMPTS), encoder.size) and not features.requires_grad
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])
    assert not list(encoder.parameters())  # the policy's weights are not counted twice
    copied = copy.deepcopy(encoder)
    assert torch.equal(copied({"prompt": PROMPTS}), features)


def test_value_head_shares_the_trunk():
    assert able(make().policy, Values) is None
    policy = make(value_head=True).policy
    with torch.no_grad():
        policy.head.weight.normal_(generator=rng(3))
    trace = policy.retrace({"prompt": PROMPTS}, ["x"] * len(PROMPTS))
    value = policy.value({"prompt": PROMPTS}, trace)
    assert value.shape == (len(PROMPTS),) and value[0] == value[1] != value[2]
    value.sum().backward()
    assert {"head.weight", "model.model.embed_tokens.weight"} <= set(gradient(policy))
    units = policy.unit_values({"prompt": PROMPTS}, ["x"] * len(PROMPTS), trace)
    assert units.shape == (len(PROMPTS), 2)
    torch.testing.assert_close(units[:, 0], value, atol=1e-5, rtol=1e-5)  # before the first token: the prompt's
    assert not torch.allclose(units[:, 1], units[:, 0])
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        policy.head.weight.zero_()
    assert torch.equal(copied.value({"prompt": PROMPTS}, trace), value)  # the copy has a head of its own


def test_which_text_is_the_prompt():
    assert make(space=TEXT).policy.key == "observation"
    more = gymnasium.spaces.Dict({"task": TEXT, "x": gymnasium.spaces.Discrete(2)})
    assert make(space=more, key="task").policy.key == "task"
    with pytest.raises(ValueError, match="'x' would not be read"):
        make(space=more)
    both = gymnasium.spaces.Dict({"a": TEXT, "b": TEXT})
    assert make(space=both, key="b").policy.key == "b"
    with pytest.raises(ValueError, match="2 texts"):
        make(space=both)
    with pytest.raises(ValueError, match="'c' is no text"):
        make(space=both, key="c")
    with pytest.raises(ValueError, match="0 texts"):
        make(space=gymnasium.spaces.Discrete(3))
    with pytest.raises(ValueError, match="a Text space is expected"):
        build_agent({"id": "language", "model": {"tiny": {}}}, SPACE, gymnasium.spaces.Discrete(3), rng())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "plain", "system": "hi"}, "system message has no effect"),
        ({"tempertaure": 1.0}, "did you mean 'temperature'"),
        ({"model": {"tinny": {}}}, "should be 'tiny'"),
        ({"model": "/no/such/folder"}, "does not exist"),
        ({"tiny": {"vocab_size": 100}}, "smaller than the tokenizer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_prompts_that_cannot_be_continued():
    policy = make(prompt="plain", tiny={"max_tokens": 64}).policy
    with pytest.raises(ValueError, match="empty prompt"):
        policy.act({"prompt": [""]}, rng=rng())
    with pytest.raises(ValueError, match="exceed the model's context of 64"):
        policy.act({"prompt": ["a" * 60]}, rng=rng())
    with pytest.raises(ValueError, match="no text 'prompt'"):
        policy.act({"other": ["a"]}, rng=rng())


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path), dtype="fp32", rng=rng())


def test_tokenizer_of_another_model():
    model, tokenizer = tiny_causal_lm(TinyConfig(hidden_size=32), rng=rng())
    large = tiny_tokenizer(merges=30, corpus=["the cat sat on the mat"])
    with pytest.raises(ValueError, match="do not belong together"):
        CausalLM(model, large)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.eos_token, tokenizer.chat_template = None, None
    with pytest.raises(ValueError, match="has an end token"):
        CausalLM(model, tokenizer)


def test_a_model_that_changes_its_logits_is_refused():
    model, tokenizer = tiny_causal_lm(TinyConfig(hidden_size=32), rng=rng())
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="changes its logits"):
        CausalLM(model, tokenizer)


def test_decisions_are_what_the_engine_expects():
    taken = make().policy.act({"prompt": PROMPTS}, rng=rng(1))
    assert isinstance(taken, Decisions) and all(isinstance(text, str) for text in taken.action)
    assert taken.log_prob.values.dtype == np.float32 and taken.trace["reply"].values.dtype == np.int64
