"""An MLP as one node of the graph is its layers one by one; the Gaussian as one node is torch's."""

import functools
import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from embodied_rft.names import UserError
from embodied_rft.networks import fused
from embodied_rft.networks.fused import GaussianLogProb, GaussianSample
from embodied_rft.networks.mlp import MLP
from tests.lab.draws import generator


def layer_by_layer(mlp, x):
    return mlp.last(mlp.hidden(x))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 70),
    st.lists(st.integers(1, 40), max_size=3),
    st.integers(1, 5),
    st.integers(1, 50),
    st.sampled_from(["relu", "tanh"]),
)
def test_values_and_gradients_are_those_of_the_layers(in_features, hidden, out, rows, activation):
    mlp = MLP(in_features, hidden, out, rng=generator(), activation=activation)
    x = torch.randn(rows, in_features, generator=generator(1)).requires_grad_()
    weight = torch.randn(rows, out, generator=generator(2))
    wanted = [x, *mlp.parameters()]
    ours, theirs = mlp(x), layer_by_layer(mlp, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), wanted), torch.autograd.grad((theirs * weight).sum(), wanted)
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_without_a_graph_the_values_are_the_same_bits(activation):
    mlp = MLP(6, [8, 8], 2, rng=generator(), activation=activation)
    x = torch.randn(5, 6, generator=generator(1))
    with torch.no_grad():
        alone = mlp(x.clone())
    assert torch.equal(alone, mlp(x)) and not alone.requires_grad


def test_frozen_layers_get_no_gradient_and_pass_it_on():
    mlp = MLP(6, [8, 8], 2, rng=generator())
    mlp.hidden[0].weight.requires_grad_(False)
    mlp.last.requires_grad_(False)
    x = torch.randn(5, 6, generator=generator(1))
    mlp(x).square().sum().backward()
    found = {name: p.grad for name, p in mlp.named_parameters()}
    mlp.zero_grad()
    layer_by_layer(mlp, x).square().sum().backward()
    for name, p in mlp.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad)
        else:
            assert found[name] is None


def test_a_layer_that_was_replaced_is_used():
    mlp = MLP(6, [8], 2, rng=generator())
    x = torch.randn(5, 6, generator=generator(1))
    before = mlp(x)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    last = Doubled(8, 2)
    last.load_state_dict(mlp.last.state_dict())
    mlp.last = last
    torch.testing.assert_close(mlp(x), 2 * before)


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(UserError, match="EMBODIED_RFT_FUSED=0"):
        torch.autograd.grad(MLP(4, [5], 1, rng=generator())(x).sum(), x, create_graph=True)


def test_hooks_on_a_layer_are_heard():
    mlp, heard = MLP(6, [8], 2, rng=generator()), []
    x = torch.randn(5, 6, generator=generator(1))
    before = mlp(x)
    hooks = [
        mlp.hidden[0].register_forward_hook(lambda layer, given, out: 2 * out),
        mlp.last.register_forward_pre_hook(lambda layer, given: heard.append(given[0])),
        mlp.last.register_full_backward_hook(lambda layer, *gradients: heard.append(gradients)),
    ]
    mlp(x).sum().backward()
    torch.testing.assert_close(heard[0], torch.relu(2 * mlp.hidden[0].bias + 2 * x @ mlp.hidden[0].weight.T))
    assert len(heard) == 2
    for hook in hooks:
        hook.remove()
    assert torch.equal(mlp(x), before)


def values_and_gradients(function, *given):
    """What a function gives, and the gradients of a weighted sum of it."""
    given = [g.clone().requires_grad_() for g in given]
    found = function(*given)
    found = found if isinstance(found, tuple) else (found,)
    weights = [torch.randn(x.shape, generator=generator(9), dtype=x.dtype) for x in found]
    sum((x * w).sum() for x, w in zip(found, weights, strict=True)).backward()
    return [*found, *(g.grad for g in given)]


def wide(*shape, seed):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def two_forms():
    """{name: (function, arguments that gradients are taken of)}."""
    for activation in ("relu", "tanh"):
        yield activation, MLP(3, [5, 4], 2, rng=generator(), activation=activation), wide(7, 3, seed=0).float()
    for low, high in ((0.2, 0.3), (None, 0.3), (0.2, None)):
        advantage = wide(40, 1, seed=1)
        surrogate = functools.partial(fused.pessimistic, advantage=advantage, low=low, high=high)
        yield f"surrogate {low} {high}", surrogate, wide(40, 3, seed=0)
    for shape, squashed in itertools.product(((3,), (7, 3)), (False, True)):
        density = functools.partial(fused.gaussian_log_prob, squashed=squashed)
        yield f"density {shape} {squashed}", density, wide(7, 3, seed=0), wide(7, 3, seed=1), wide(*shape, seed=2)
        sample = functools.partial(fused.gaussian_sample, noise=wide(7, 3, seed=0), squashed=squashed)
        yield f"sample {shape} {squashed}", sample, wide(7, 3, seed=1), wide(*shape, seed=2)


TWO_FORMS = {name: form for name, *form in two_forms()}


@pytest.mark.parametrize("name", TWO_FORMS)
def test_the_fused_form_is_the_plain_one(name, monkeypatch):
    function, *given = TWO_FORMS[name]
    one = values_and_gradients(function, *given)
    monkeypatch.setattr(fused, "ENABLED", False)
    torch.testing.assert_close(one, values_and_gradients(function, *given))


def test_an_environment_variable_chooses_the_plain_form():
    script = """
        import torch
        from embodied_rft.networks.mlp import MLP
        x = torch.randn(3, 4, requires_grad=True)
        y = MLP(4, [5], 1, rng=torch.Generator(), activation="tanh")(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0
    """
    for value, code in (("0", 0), ("1", 1)):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=os.environ | {"EMBODIED_RFT_FUSED": value},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert ("set EMBODIED_RFT_FUSED=0" in done.stderr) == bool(code)


def squash_if(squashed, gaussian):
    return TransformedDistribution(gaussian, TanhTransform(cache_size=1)) if squashed else gaussian


def gaussian_inputs(shape):
    first, mean = (torch.randn(7, 3, generator=generator(i), dtype=torch.float64).requires_grad_() for i in range(2))
    return first, mean, (0.3 * torch.randn(shape, generator=generator(2), dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("squashed", [False, True])
@pytest.mark.parametrize("shape", [(3,), (7, 3)])
def test_the_gaussian_is_torchs(shape, squashed):
    u, mean, log_std = gaussian_inputs(shape)
    normal = Normal(mean, log_std.exp())
    expected = squash_if(squashed, normal).log_prob(torch.tanh(u) if squashed else u).sum(-1)
    log_prob, entropy = GaussianLogProb.apply(u, mean, log_std, squashed)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))
    assert torch.autograd.gradcheck(lambda *given: GaussianLogProb.apply(*given, squashed), (u, mean, log_std))
    for only in (0, 1):  # the other one's gradient is missing
        assert torch.autograd.gradcheck(
            lambda mean, log_std, only=only: GaussianLogProb.apply(u.detach(), mean, log_std, squashed)[only],
            (mean, log_std),
        )


@pytest.mark.parametrize("squashed", [False, True])
@pytest.mark.parametrize("shape", [(3,), (7, 3)])
def test_a_sample_of_the_gaussian_is_torchs(shape, squashed):
    noise, mean, log_std = gaussian_inputs(shape)
    noise = noise.detach()
    u, log_prob = GaussianSample.apply(mean, log_std, noise, squashed)
    torch.testing.assert_close(u, mean + log_std.exp() * noise)
    expected = squash_if(squashed, Normal(mean, log_std.exp())).log_prob(torch.tanh(u) if squashed else u).sum(-1)
    torch.testing.assert_close(log_prob, expected)
    assert torch.autograd.gradcheck(lambda *given: GaussianSample.apply(*given, noise, squashed), (mean, log_std))
