"""Token loss and shared prefixes: equal to the plain computation in value and gradient, for any lengths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm
from embodied_rft.data import Ragged
from embodied_rft.tokens import prefix
from embodied_rft.tokens.decoder import Decoder
from embodied_rft.tokens.log_probs import Head, plain_token_log_probs, token_log_probs
from embodied_rft.tokens.prefix_tree import Usage, count_tokens

LAYERS = 2


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def decoder(request):
    config = TinyConfig(kind=request.param, hidden_size=32, num_layers=LAYERS)
    return tiny_causal_lm(config, rng=torch.Generator().manual_seed(0))[0].model


def rows(rng, prompt_lengths, kinds, reply_lengths):
    prompts = [rng.integers(5, 200, size=n) for n in prompt_lengths]
    replies = [rng.integers(5, 200, size=n) for n in reply_lengths]
    return Ragged.of([prompts[k] for k in kinds], dtype=np.int64), Ragged.of(replies, dtype=np.int64)


def states_and_gradient(decoder, prompts, replies, **options):
    """States of all reply tokens, and the gradient of a random projection of them."""
    hidden = prefix.reply_states(Decoder(decoder), prompts, replies, **options)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    decoder.zero_grad()
    (hidden * weight).sum().backward()
    return hidden.detach(), torch.cat([p.grad.flatten() for p in decoder.parameters()])


def slow_states(decoder, prompts, replies):
    """One row at a time, nothing padded, nothing shared."""
    states = []
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, reply]))[None]
        hidden = decoder(input_ids=ids).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : len(prompt) + len(reply) - 1])
    return torch.cat(states)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_sharing_changes_nothing(decoder, data):
    seed = data.draw(st.integers(0, 2**16))
    prompt_lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    count = data.draw(st.integers(1, 9))
    kinds = data.draw(st.lists(st.integers(0, len(prompt_lengths) - 1), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    prompts, replies = rows(np.random.default_rng(seed), prompt_lengths, kinds, lengths)
    expected = slow_states(decoder, prompts, replies)
    for options in ({"overhead": 0}, {"overhead": 8}, {"share": False, "overhead": 8}):
        states = prefix.reply_states(Decoder(decoder), prompts, replies, **options)
        assert states.shape == (sum(lengths), 32)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("overhead", [0, 10, 40])
def test_shared_gradient_equals_dense(decoder, overhead):
    lengths = [4, 1, 6, 2, 0, 9, 3, 5, 4]
    prompts, replies = rows(np.random.default_rng(0), (37, 12, 12, 3), (0, 0, 1, 1, 1, 2, 2, 3, 0), lengths)
    dense = states_and_gradient(decoder, prompts, replies, share=False)
    shared = states_and_gradient(decoder, prompts, replies, overhead=overhead)
    alone = count_tokens(prompts, replies, share=False).computed
    assert count_tokens(prompts, replies, overhead=overhead).computed < alone
    torch.testing.assert_close(shared[0], dense[0], rtol=0, atol=1e-5)
    assert (shared[1] - dense[1]).norm() < 1e-5 * dense[1].norm()
    again = states_and_gradient(decoder, prompts, replies, overhead=overhead)
    assert torch.equal(shared[0], again[0]) and torch.equal(shared[1], again[1])


@pytest.mark.parametrize("prompt_lengths", [(40, 40), (40, 33)])
def test_members_in_one_row_equal_dense(decoder, prompt_lengths, monkeypatch):
    """Short replies of equal groups are computed in one row a group; there, too, nothing changes."""
    prompts, replies = rows(np.random.default_rng(0), prompt_lengths, [0] * 4 + [1] * 4, [5, 3, 5, 2, 4, 5, 5, 5])
    used = []
    one_row = prefix.Prompts._as_one_row
    monkeypatch.setattr(prefix.Prompts, "_as_one_row", lambda *args: used.append(1) or one_row(*args))
    shared = states_and_gradient(decoder, prompts, replies)
    assert used
    dense = states_and_gradient(decoder, prompts, replies, share=False)
    torch.testing.assert_close(shared[0], dense[0], rtol=0, atol=1e-5)
    assert (shared[1] - dense[1]).norm() < 1e-5 * dense[1].norm()


def turns(rng, groups=2, siblings=3, length=4, system=60):
    """Decisions of agents that talk: (prompts, replies); a turn's prompt is all that was said before it."""
    system = rng.integers(5, 200, size=system)
    prompts, replies = [], []
    for _ in range(groups):
        task = rng.integers(5, 200, size=rng.integers(30, 50))
        for _ in range(siblings):
            said = np.concatenate([system, task])
            for _ in range(length):
                prompts.append(said)
                replies.append(rng.integers(5, 200, size=rng.integers(3, 9)))
                said = np.concatenate([said, replies[-1], rng.integers(5, 200, size=rng.integers(2, 30))])
    order = rng.permutation(len(prompts))
    rows = ([values[i] for i in order] for values in (prompts, replies))
    return tuple(Ragged.of(values, dtype=np.int64) for values in rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_turns_are_computed_once(decoder, checkpointing):
    """A system message, tasks, siblings, their turns: equal to dense, every token computed once but for padding."""
    prompts, replies = turns(np.random.default_rng(0))
    alone, shared = (count_tokens(prompts, replies, share=share) for share in (False, True))
    assert shared.useful / shared.computed > 0.9 and alone.computed > 5 * shared.computed
    dense = states_and_gradient(decoder, prompts, replies, share=False)
    if checkpointing:
        decoder.train().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        for layer in decoder.layers:
            layer._can_checkpoint_with_cache = True
    usage = Usage()
    once = states_and_gradient(decoder, prompts, replies, usage=usage)
    if checkpointing:
        decoder.eval().activation_checkpointing_disable()
    assert usage == shared
    torch.testing.assert_close(once[0], dense[0], rtol=0, atol=1e-5)
    assert (once[1] - dense[1]).norm() < 1e-5 * dense[1].norm()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(5, 6), min_size=2, max_size=9), min_size=1, max_size=9), st.data())
def test_any_tree_equals_dense(decoder, texts, data):
    cuts = [data.draw(st.integers(1, len(text))) for text in texts]
    prompts = Ragged.of([text[:cut] for text, cut in zip(texts, cuts, strict=True)], dtype=np.int64)
    replies = Ragged.of([text[cut:] for text, cut in zip(texts, cuts, strict=True)], dtype=np.int64)
    if not len(replies.values):
        return
    dense = states_and_gradient(decoder, prompts, replies, share=False)
    for overhead in (0, 2):
        shared = states_and_gradient(decoder, prompts, replies, overhead=overhead)
        torch.testing.assert_close(shared[0], dense[0], rtol=0, atol=1e-5)
        assert (shared[1] - dense[1]).norm() < 2e-5 * dense[1].norm()


def test_a_wrong_prefix_is_noticed(decoder):
    """The equality above means something: another prompt of the same length gives other states."""
    prompts, replies = rows(np.random.default_rng(0), (40, 40), (0, 0, 0, 0), (4, 4, 4, 4))
    other, _ = rows(np.random.default_rng(1), (40, 40), (0, 0, 0, 0), (4, 4, 4, 4))
    a = prefix.reply_states(Decoder(decoder), prompts, replies)
    b = prefix.reply_states(Decoder(decoder), other, replies)
    assert (a - b).abs().max() > 1e-2


def test_each_distinct_prompt_is_computed_once(decoder):
    prompts, replies = rows(np.random.default_rng(0), (100, 80), [0] * 8 + [1] * 8, [5] * 16)
    seen = []
    handle = decoder.embed_tokens.register_forward_hook(lambda module, given, output: seen.append(given[0].numel()))
    prefix.reply_states(Decoder(decoder), prompts, replies, overhead=10)
    handle.remove()
    assert sum(seen) == 100 + 80 + 16 * 4 == count_tokens(prompts, replies, overhead=10).computed


def test_prompt_states_are_the_last_ones(decoder):
    prompts, _ = rows(np.random.default_rng(0), (7, 3, 30), (2, 0, 1, 0), (1, 1, 1, 1))
    expected = slow_states(decoder, prompts, Ragged.of([[0]] * 4, dtype=np.int64))
    torch.testing.assert_close(prefix.prompt_states(Decoder(decoder), prompts), expected, rtol=0, atol=1e-5)


def test_nothing_but_empty_replies(decoder):
    prompts, replies = rows(np.random.default_rng(0), (3,), (0, 0), (0, 0))
    assert prefix.reply_states(Decoder(decoder), prompts, replies).shape == (0, 32)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_elements", [0, 10**9])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 25), st.floats(0.3, 2.0), st.floats(0.3, 2.0))
def test_token_loss_equals_plain(softcap, bias, keep_elements, seed, tokens, chunk, scale, temperature):
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(shape, generator=rng, requires_grad=True) for shape in ((tokens, 6), (30, 6)))
    offset = torch.randn(30, generator=rng, requires_grad=True) if bias else None
    head = Head(weight, offset, scale=scale, softcap=softcap, temperature=temperature)
    targets = torch.randint(30, (tokens,), generator=rng)
    inputs = [t for t in (hidden, weight, offset) if t is not None]

    def value_and_gradient(pair):
        factor = torch.linspace(-1, 1, tokens)
        return [*pair, *torch.autograd.grad((pair[0] * factor).sum() + (pair[1] * factor).square().sum(), inputs)]

    plain = value_and_gradient(plain_token_log_probs(hidden, targets, head))
    chunked = value_and_gradient(token_log_probs(hidden, targets, head, chunk=chunk, keep_elements=keep_elements))
    for a, b in zip(chunked, plain, strict=True):  # a gradient grows with scale / temperature, and so does its rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + float(b.abs().max())))


def test_token_loss_leaves_out_gradients_nobody_wants():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    log_prob, entropy = token_log_probs(hidden, torch.tensor([1, 2, 3, 4]), Head(weight))
    entropy.sum().backward()
    assert hidden.grad is not None and weight.grad is None
    assert (entropy >= 0).all() and (log_prob <= 0).all()


def test_token_loss_under_autocast_is_close():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 32, generator=rng), torch.randn(50, 32, generator=rng, requires_grad=True)
    targets = torch.randint(50, (9,), generator=rng)
    expected, _ = plain_token_log_probs(hidden, targets, Head(weight))
    with torch.autocast("cpu", torch.bfloat16):
        log_prob, _ = token_log_probs(hidden, targets, Head(weight))
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32 and weight.grad.dtype == torch.float32
    assert (log_prob - expected).abs().max() < 0.2


def test_uniform_entropy_is_log_of_the_vocabulary():
    _, entropy = token_log_probs(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), Head(torch.randn(50, 4)))
    torch.testing.assert_close(entropy, torch.full((3,), float(np.log(50))))
