"""The checkers pass on everything registered, and each rule has an environment or a policy that breaks it."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import embodied_rft.envs  # noqa: F401
from embodied_rft import registry
from embodied_rft.data import Decisions, Field
from embodied_rft.policy import Policy, build_policy
from embodied_rft.testing.check_env import check_env
from embodied_rft.testing.check_policy import check_policy
from tests.lab.helpers_envs import Chatter, Moody
from tests.lab.worlds import IDS, PAGES, SERVED

WORLDS = {*IDS, *SERVED, *PAGES}  # of other packages, checked in tests/envs/worlds and tests/envs/gui
OURS = sorted(id for id in gymnasium.registry if id.startswith("embodied_rft/") and id not in WORLDS)
BOX = spaces.Box(-2.0, 2.0, (3,), np.float32)
VECTORS = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (5,), np.float32)})


@pytest.mark.parametrize("id", [*OURS, "Moody-v0", "Chatter-v0", "CartPole-v1"])
def test_registered_environments_pass(id, tmp_path):
    options = {}
    if id.endswith("Jsonl-v0"):  # asks what a file says
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(f'{{"prompt": "{n} + 1 =", "answer": "{n + 1}"}}\n' for n in range(20)))
        options = {"path": str(file)}
    if id == "embodied_rft/RecordedSteps-v0":  # asks whose episodes
        options = {"of": "embodied_rft/ClickScreen-v0"}
    if id == "embodied_rft/Told-v0":  # asks what it is that is told
        options = {"of": "embodied_rft/NumberLine-v0"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(id, options=options)


def test_an_instance_is_checked_alone():
    check_env(gymnasium.make("Moody-v0"))


class OwnDice(Moody):
    """Draws from a generator that no seed reaches."""

    dice = np.random.default_rng()

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + self.dice.random(), *rest


class Deaf(Moody):
    """Starts always in the same state and never draws again."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=0 if seed is not None else None, options=options)


class Picky(Moody):
    """Fails an assertion without a message where Gymnasium looks closer than a run does."""

    def reset(self, *, seed=None, options=None):
        assert options != {}
        return super().reset(seed=seed, options=options)


class Infinite(Moody):
    """The reward overflows in the middle of the episode."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, (float("inf") if self.steps == 4 else reward), *rest


class Forgetful(Moody):
    """Its state lacks the step counter."""

    def set_state(self, state):
        steps = self.steps
        super().set_state(state)
        self.steps = steps


class Aliased(Moody):
    """Its state is a view that later steps overwrite... and restores nothing."""

    def set_state(self, state):
        pass


class Silent(Moody):
    """Reports success during the episode, but not at its end."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {} if truncated else info


class Liar(Moody):
    """Observes what its space does not contain."""

    def _observe(self):
        return {**super()._observe(), "state": np.zeros(3, np.float32)}


class Late(Moody):
    """Raises in the middle of the episode."""

    def step(self, action):
        return super().step(action + (None if self.steps == 3 else 0))


class Doubtful(Moody):
    """Is not sure of its success."""

    def step(self, action):
        return *super().step(action)[:4], {"success": "perhaps"}


class Deep(Moody):
    """Wants an action of two dimensions."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(0, 10, (2,), np.int64)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (OwnDice, "two episodes from seed 7 differ at step 1"),
        (Deaf, "same episode"),
        (Picky, r"Gymnasium's checker: AssertionError: .+"),
    ],
)
def test_what_a_run_would_warn_of_is_a_warning(odd, message):
    with pytest.warns(UserWarning, match=message):
        check_env(odd())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Infinite, "'reward' is NaN or infinite at step 4"),
        (Forgetful, r"set_state\(get_state\(\)\)"),
        (Aliased, r"set_state\(get_state\(\)\)"),
        (Silent, "not on its last step"),
        (Liar, r"'state' is an array float32 \(3,\); the observation space promises"),
        (Late, r"TypeError: unsupported operand .* in step"),
        (Doubtful, r"info\['success'\] is 'perhaps'"),
        (Deep, "no agent can act here"),
    ],
)
def test_broken_environments_are_caught(broken, message):
    with pytest.raises(ValueError, match=message):
        check_env(broken())


class Vector(gymnasium.vector.SyncVectorEnv):
    """The vector form of Moody with a reward of its own."""

    def __init__(self, *, num_envs, autoreset_mode, max_episode_steps):
        super().__init__([lambda: gymnasium.make("Moody-v0")] * num_envs, autoreset_mode=autoreset_mode)

    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward + 0.01, *rest


def test_a_vector_form_that_differs_is_caught():
    spec = gymnasium.envs.registration.EnvSpec(
        "Moody-v7", entry_point=Moody, vector_entry_point=Vector, max_episode_steps=50
    )
    with pytest.raises(ValueError, match="vector and single form at step 0: 'reward' differs"):
        check_env(spec)


def test_wrong_ids_and_options_are_explained():
    with pytest.raises(ValueError, match="did you mean 'Moody-v0'"):
        check_env("Mody-v0")
    with pytest.raises(ValueError, match="refused its options"):
        check_env("Moody-v0", options={"gravity": 1})


# --- policies --------------------------------------------------------------------------------------------------------

BASE = {"base": {"id": "gaussian", "hidden": [8]}}


def make_policy(id, **options):
    return build_policy({"id": id, **options}, VECTORS, BOX, torch.Generator().manual_seed(0))


def make_simplest(id):
    """With no options, or as an adapter of a small Gaussian; None for what needs files, text or images."""
    for options in ({}, BASE):
        try:
            return make_policy(id, **options)
        except ValueError:
            continue
    return None


def test_every_registered_policy_of_vectors_passes():
    policies = {id: policy for id in registry.known("agent") if (policy := make_simplest(id)) is not None}
    policies = {id: policy for id, policy in policies.items() if policy.planner is None}  # needs a QueuedPool
    assert {"gaussian", "residual"} <= set(policies)
    for policy in policies.values():
        check_policy(policy, VECTORS, BOX)


@pytest.mark.parametrize("id", ["gaussian", "residual"])
def test_deterministic_actors_pass(id):
    options = BASE if id == "residual" else {}
    check_policy(make_policy(id, deterministic=True, hidden=[8], **options), VECTORS, BOX)


class Uniform(Policy):
    """A correct little policy: a Gaussian around a linear map, clipped by nobody because it is squashed."""

    num_units = 1
    trace_fields = {"u": Field((3,))}

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-0.3, 0.3, 15).view(3, 5))
            self.linear.bias.zero_()

    def _centre(self, observation):
        return self.linear(torch.as_tensor(observation["state"]))

    def _log_prob(self, centre, u):
        normal = torch.distributions.Normal(centre, 0.5).log_prob(u)
        return (normal - torch.log(2 * (1 - torch.tanh(u) ** 2) + 1e-6)).sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, observation, *, greedy=False, rng=None):
        centre = self._centre(observation)
        u = centre if greedy else centre + 0.5 * torch.randn(centre.shape, generator=rng)
        return Decisions(2 * torch.tanh(u).numpy(), self._log_prob(centre, u).numpy(), {"u": u.numpy()})

    def log_prob(self, observation, action, trace):
        log_prob = self._log_prob(self._centre(observation), trace["u"])
        return log_prob, -log_prob


class GlobalDice(Uniform):
    def act(self, observation, *, greedy=False, rng=None):
        torch.rand(())
        return super().act(observation, greedy=greedy, rng=rng)


class IgnoresGenerator(Uniform):
    calls = 0

    def act(self, observation, *, greedy=False, rng=None):
        type(self).calls += 1
        rng = torch.Generator().manual_seed(self.calls)
        return super().act(observation, greedy=greedy, rng=rng)


class NotGreedy(Uniform):
    calls = 0

    def act(self, observation, *, greedy=False, rng=None):
        type(self).calls += 1
        rng = torch.Generator().manual_seed(self.calls) if greedy else rng
        return super().act(observation, rng=rng)


class WrongLogProb(Uniform):
    def log_prob(self, observation, action, trace):
        log_prob, entropy = super().log_prob(observation, action, trace)
        return log_prob + 1e-3, entropy


class Flat(Uniform):
    def act(self, observation, *, greedy=False, rng=None):
        decisions = super().act(observation, greedy=greedy, rng=rng)
        return Decisions(decisions.action, decisions.log_prob[:, 0], decisions.trace)


class OutOfBounds(Uniform):
    def act(self, observation, *, greedy=False, rng=None):
        decisions = super().act(observation, greedy=greedy, rng=rng)
        return Decisions(decisions.action * 10, decisions.log_prob, decisions.trace)


class NoTrace(Uniform):
    def act(self, observation, *, greedy=False, rng=None):
        decisions = super().act(observation, greedy=greedy, rng=rng)
        return Decisions(decisions.action, decisions.log_prob)


class Neighbours(Uniform):
    def _centre(self, observation):
        centre = super()._centre(observation)
        return centre - centre.mean(0)


class HiddenWeight(Uniform):
    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k != "linear.bias"}

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)


class WrongMode(Uniform):
    def mode(self, observation):
        return 2 * torch.tanh(self._centre(observation)) + 0.01


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (GlobalDice, "global generator"),
        (IgnoresGenerator, "two answers from equal rng"),
        (NotGreedy, "greedy=True"),
        (WrongLogProb, "disagree by 0.001"),
        (Flat, r"log_prob \(6,\)"),
        (OutOfBounds, "inside Box"),
        (NoTrace, "trace_fields promises"),
        (Neighbours, "rows to be independent"),
        (HiddenWeight, "load_state_dict"),
        (WrongMode, "mode and act"),
    ],
)
def test_broken_policies_are_caught(broken, message):
    check_policy(Uniform(), VECTORS, BOX)
    with pytest.raises(ValueError, match=message):
        check_policy(broken(), VECTORS, BOX)


def test_text_policy():
    class Parrot(Policy):
        """Says the beginning of what it hears."""

        def act(self, observation, *, greedy=False, rng=None):
            replies = [text[:3] for text in observation["observation"]]
            return Decisions(replies, np.zeros((len(replies), 1), np.float32))

        def log_prob(self, observation, action, trace):
            return torch.zeros(len(action), 1), torch.zeros(len(action), 1)

    chatter = Chatter()
    check_policy(Parrot(), chatter.observation_space, chatter.action_space)
