"""Generation: equal to the library's, whatever else is in the batch; one prefill a prompt, stops, sampling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.agents.models.causal_lm import CausalLM
from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm, tiny_tokenizer
from embodied_rft.data import Ragged
from embodied_rft.tokens.decoder import Decoder
from embodied_rft.tokens.generation import Sampling, draw, generate
from embodied_rft.tokens.log_probs import token_log_probs
from embodied_rft.tokens.prefix import Prompts, reply_states
from tests.agents.test_language import PROMPTS, make, rng

KINDS = ["qwen2", "llama", "gpt2"]  # rotary positions, and learned ones


def sharp(model):
    """Random weights so large that every token of the context matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    return model


@pytest.fixture(scope="module", params=KINDS)
def lm(request):
    model, tokenizer = tiny_causal_lm(TinyConfig(kind=request.param, hidden_size=32), rng=rng(3))
    return CausalLM(sharp(model), tokenizer)


def continued(lm, prompts, *, max_new_tokens=6, generator=None):
    """Replies to lists of token ids."""
    rows = Ragged.of(prompts, dtype=np.int64)
    sampling = Sampling(max_new_tokens=max_new_tokens, eos=lm.eos)
    return generate(Decoder(lm.decoder), lm.head(), rows, sampling=sampling, rng=generator)


def count_tokens(decoder):
    """A list that gets the number of tokens of each call from now on."""
    seen = []
    decoder.get_input_embeddings().register_forward_hook(lambda module, given, output: seen.append(given[0].numel()))
    return seen


IDS = st.lists(st.integers(5, 200), min_size=1, max_size=12)


@settings(max_examples=8, deadline=None)
@given(prompts=st.lists(IDS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_reply_does_not_depend_on_the_rest_of_the_batch(lm, prompts, seed):
    """Prompts of other lengths pad this one on the left; rows that end leave."""
    order = np.random.default_rng(seed).permutation(2 * len(prompts)) % len(prompts)
    together = continued(lm, [prompts[i] for i in order])
    for place, i in enumerate(order):
        alone = continued(lm, [prompts[i]])
        assert together.ids.row(place).tolist() == alone.ids.row(0).tolist()
        np.testing.assert_allclose(together.log_prob.row(place), alone.log_prob.row(0), atol=1e-4)
        assert together.cut[place] == alone.cut[0]


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(IDS, min_size=2, max_size=5))
def test_padding_on_the_left_changes_no_state(lm, prompts):
    padded = Prompts.read(Decoder(lm.decoder), Ragged.of(prompts, dtype=np.int64))
    for i, ids in enumerate(prompts):
        plain = lm.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(padded.hidden[i, -len(ids) :], plain, atol=1e-4, rtol=1e-4)


def test_sampled_replies_are_scored_as_the_library_scores_them(lm):
    """By the generator, and by a learner with and without sharing."""
    prompts = [[7, 8, 9], [7, 8, 9], list(range(20, 37)), [11]]
    replies = continued(lm, prompts, generator=rng(1))
    assert len({tuple(row) for row in replies.ids}) == 4
    targets = torch.from_numpy(replies.ids.values)
    for share in (True, False):
        rows = Ragged.of(prompts, dtype=np.int64), replies.ids
        states = reply_states(Decoder(lm.decoder), *rows, share=share, overhead=0)
        scores, _ = token_log_probs(states, targets, lm.head())
        np.testing.assert_allclose(scores.detach(), replies.log_prob.values, atol=1e-4)
    for prompt, ids, log_prob in zip(prompts, replies.ids, replies.log_prob, strict=True):
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.from_numpy(ids)[:, None])[:, 0]
        np.testing.assert_allclose(log_prob, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(kind):
    """Against the library's own greedy search."""
    policy = make(tiny={"kind": kind}).policy
    sharp(policy.model)
    taken = policy.act({"prompt": PROMPTS}, greedy=True)
    for prompt, reply in zip(policy.prompt_ids({"prompt": PROMPTS}), taken.trace["reply"], strict=True):
        expected = policy.model.generate(torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False)[0]
        assert expected[len(prompt) :].tolist() == reply.tolist()


def test_each_distinct_prompt_is_read_once():
    policy = make(prompt="plain", max_new_tokens=3).policy
    policy.lm.eos = frozenset()
    seen = count_tokens(policy.lm.decoder)
    policy.act({"prompt": ["a" * 50] * 8}, rng=rng())
    assert seen == [50, 8, 8]


def test_finished_rows_leave():
    policy = make(prompt="plain", max_new_tokens=40).policy
    policy.lm.eos = frozenset(range(150))  # more than half of all tokens end a reply
    seen = count_tokens(policy.lm.decoder)
    asked = {"prompt": ["ab", "c"] * 32}
    taken = policy.act(asked, rng=rng())
    lengths = taken.trace["reply"].lengths
    assert sum(seen[1:]) < 1.3 * (lengths - 1).sum() and len(seen) == lengths.max() and not taken.trace["cut"].any()
    log_prob, _ = policy.log_prob(asked, taken.action, taken.trace)
    np.testing.assert_allclose(log_prob.detach().numpy(), taken.log_prob.pad()[0], atol=1e-5)


def test_stop_texts_end_a_reply_and_are_not_shown():
    policy = make(max_new_tokens=60, prompt="plain", stop=("a", "zz")).policy
    taken = policy.act({"prompt": ["hello"] * 32}, rng=rng())
    stopped = [policy.tokenizer.decode(row).endswith("a") for row in taken.trace["reply"]]
    assert sum(stopped) > 2 and not any("a" in text for text in taken.action)
    ended = [
        s or row[-1] == policy.tokenizer.eos_token_id for s, row in zip(stopped, taken.trace["reply"], strict=True)
    ]
    assert (taken.trace["cut"] == ~np.array(ended)).all()


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    p = logits[0].softmax(-1)

    def share(**options):
        token, log_prob = draw(logits, Sampling(**options), rng())
        torch.testing.assert_close(log_prob, p.log()[token])  # of the whole distribution, cut or not
        return torch.bincount(token, minlength=4) / len(token)

    torch.testing.assert_close(share(), p, atol=0.015, rtol=0)
    torch.testing.assert_close(share(top_k=2)[:2], p[:2] / p[:2].sum(), atol=0.015, rtol=0)
    assert share(top_k=2)[2:].sum() == 0
    assert (share(top_p=float(p[0] + 0.5 * p[1])) > 0).tolist() == [True, True, False, False]
    assert (share(top_p=1e-6) > 0).tolist() == [True, False, False, False]
    only, _ = draw(logits, Sampling(), rng(), torch.tensor([False, False, False, True]))
    assert (only == 3).all()


def test_a_stop_text_that_never_comes():
    policy = make(max_new_tokens=5, prompt="plain", stop=("never said",)).policy
    taken = policy.act({"prompt": PROMPTS}, rng=rng())
    eos = policy.tokenizer.eos_token_id
    assert taken.trace["cut"].tolist() == [eos not in row for row in taken.trace["reply"]]
    assert (taken.trace["reply"].lengths <= 5).all() and taken.trace["cut"].any()


def test_a_stop_text_made_of_several_tokens():
    policy = make(max_new_tokens=8, prompt="plain", stop=("ab\u00e9",)).policy
    assert not policy._stops(policy.tokenizer("xab")["input_ids"])
    ids = policy.tokenizer("x" * 30 + "ab\u00e9")["input_ids"]
    assert policy._stops(ids) and policy.reply_text(np.array(ids)) == "x" * 30


def test_a_decoder_that_drops_its_cache_when_checkpointing_is_refused():
    with pytest.raises(ValueError, match="with gradient_checkpointing"):
        make(tiny={"kind": "gpt2"}, gradient_checkpointing=True)


def test_a_decoder_that_keeps_no_keys_and_values_is_refused():
    from transformers import AutoModelForCausalLM, MambaConfig

    tokenizer = tiny_tokenizer()
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="refused"):
        CausalLM(AutoModelForCausalLM.from_config(config), tokenizer)
