"""`sb3`: a model saved by stable-baselines3 or sb3-contrib as a frozen policy: a baseline, or the base of a residual.

The policy is rebuilt from the weights of the zip and from the environment's spaces (`sb3_files` reads the zip safely);
what cannot be read safely is asked for. If the run used VecNormalize, its statistics are not in the zip: give the file
that `VecNormalize.save` wrote, or `save_normalizer` here, as option `normalize`.

Legend: N, B rows, A action dimensions.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal

import torch
from gymnasium import spaces
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.models import sb3_files
from embodied_rft.agents.models.sb3_files import save_normalizer as save_normalizer  # for those who write such files
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import Policy, require_rng
from embodied_rft.registry import register

logger = logging.getLogger(__name__)


@dataclass(config=STRICT, kw_only=True)
class SB3Config:
    """Options of an `sb3` agent; what is None is read from the zip."""

    path: str  # the zip that model.save() wrote
    # null: what the file says
    algorithm: Literal["SAC", "PPO", "A2C", "TD3", "DDPG", "DQN", "TQC", "CrossQ", "QRDQN", "TRPO", "ARS"] | None = None
    policy: Literal["MlpPolicy", "CnnPolicy", "MultiInputPolicy", "LinearPolicy"] | None = None  # of the algorithm
    policy_kwargs: dict[str, Any] | None = None  # classes by name: {net_arch: [64, 64], activation_fn: Tanh}
    keys: tuple[str, ...] | None = None  # observation keys that the model was trained on, in its order
    normalize: str | None = None  # file of VecNormalize.save or of save_normalizer
    trust: bool = False  # let SB3 unpickle the zip, which runs what is in it: only for files that you made yourself

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if self.trust:
            refuse_idle(self, ["algorithm", "policy", "policy_kwargs"], "with trust: the unpickled file says it all")


@register("agent", "sb3")
class SB3Policy(Policy):
    """One unit a decision; a deterministic model (TD3, DDPG, DQN, any with gSDE noise) has log-probability 0.

    The trace of a stochastic model with action vectors holds `u`: the action before squashing (SAC) or clipping (PPO).
    """

    Config = SB3Config
    num_units = 1
    spec: dict[str, Any]
    low: Tensor  # [A] bounds of the action space
    high: Tensor

    def __init__(
        self, config: SB3Config, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        archive = sb3_files.read_archive(config.path)
        self.observation_space = sb3_files.select_keys(observation_space, config.keys or archive.keys)
        sb3_files.check_action_space(archive, action_space)
        self.action_space = action_space
        self.normalizer = sb3_files.load_normalizer(config.normalize)
        self.normalizer.check(self.observation_space, config.normalize)
        with torch.random.fork_rng(devices=[]):  # SB3 draws initial weights from the global generator
            self.policy = self._build(archive)
        self.policy.set_training_mode(False)
        self.requires_grad_(False)
        self.squashed = isinstance(action_space, spaces.Box) and bool(self.policy.squash_output)
        chooser = self.policy if hasattr(self.policy, "get_distribution") else getattr(self.policy, "actor", None)
        self.stochastic = hasattr(chooser, "action_dist") and not getattr(chooser, "use_sde", False)
        vectors = self.stochastic and isinstance(action_space, spaces.Box)
        self.trace_fields = {"u": Field(tuple(action_space.shape or ()))} if vectors else {}
        if isinstance(action_space, spaces.Box):
            self.register_buffer("low", torch.from_numpy(action_space.low), persistent=False)
            self.register_buffer("high", torch.from_numpy(action_space.high), persistent=False)

    def _build(self, archive: sb3_files.Archive) -> Any:
        config = self.config
        if config.trust:
            logger.warning("trust: true, so SB3 unpickles %s and whatever code is in it runs", archive.path)
            cls, kwargs = sb3_files.read_trusted(archive.path)
        else:
            cls = sb3_files.find_class(archive, config.algorithm, config.policy, self.observation_space)
            kwargs = sb3_files.readable_kwargs(archive, config.policy_kwargs)
        parameters = inspect.signature(cls).parameters
        if "use_sde" in parameters:
            kwargs = {"use_sde": bool(archive.data.get("use_sde", False)), **kwargs}
        if "lr_schedule" in parameters:
            kwargs = {"lr_schedule": lambda _: 0.0, **kwargs}
        space = sb3_files.model_space(self.observation_space, self.normalizer)
        try:
            policy = cls(space, self.action_space, **kwargs)
            policy.load_state_dict(sb3_files.complete_weights(archive.weights, policy.state_dict()))
        except (RuntimeError, TypeError, AssertionError) as error:
            kwargs.pop("lr_schedule", None)
            raise UserError(
                f"the weights in {archive.path} do not fit a {cls.__name__} with {kwargs} on {space}, "
                f"{self.action_space}. Give the options policy_kwargs (net_arch), policy, algorithm or keys of the run "
                f"that wrote it, and its environment. {error}"
            ) from None
        return policy

    def train(self, mode: bool = True) -> SB3Policy:
        """Does nothing: the model is frozen, its dropout and batch statistics stay off."""
        return super().train(False)

    def _inputs(self, observation: Tree) -> Any:
        """What SB3's networks read: float tensors, images with channels first, statistics applied."""
        device = next(self.policy.parameters()).device
        inputs = {}
        normalizer = self.normalizer
        for key, space in sb3_files.leaves(self.observation_space).items():
            value = torch.as_tensor(observation[key], device=device)
            if key in normalizer.mean:
                mean, var = (torch.as_tensor(part[key], device=device) for part in (normalizer.mean, normalizer.var))
                value = (value - mean) / torch.sqrt(var + normalizer.epsilon)
                value = value.clamp(-normalizer.clip, normalizer.clip).float()
            elif sb3_files.is_channels_last(space):
                value = value.movedim(-1, 1)
            inputs[key] = value
        return inputs if isinstance(self.observation_space, spaces.Dict) else inputs["observation"]

    def _distribution(self, observation: Tree) -> Any:
        inputs = self._inputs(observation)
        if hasattr(self.policy, "get_distribution"):
            return self.policy.get_distribution(inputs)
        mean, log_std, _ = self.policy.actor.get_action_dist_params(inputs)
        return self.policy.actor.action_dist.proba_distribution(mean, log_std)

    def _to_env(self, raw: Tensor) -> Tensor:
        """SB3's action [B, ...] in the environment's units and bounds."""
        raw = raw.reshape(-1, *(self.action_space.shape or ()))
        if not isinstance(self.action_space, spaces.Box):
            return raw.long()  # SB3's Bernoulli actions are floats
        if self.squashed:
            return self.low + 0.5 * (raw + 1.0) * (self.high - self.low)
        return torch.minimum(torch.maximum(raw, self.low), self.high)

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]."""
        if greedy or not self.stochastic:
            raw = self.policy._predict(self._inputs(observation), deterministic=True)
            action = self._to_env(raw)
        else:
            distribution, raw = self._sample(observation, require_rng(rng))
            action = self._to_env(raw)
            if self.squashed:
                raw = distribution.gaussian_actions
        trace = {}
        if self.trace_fields:
            u = torch.atanh(raw.clamp(-1 + 1e-6, 1 - 1e-6)) if self.squashed and greedy else raw
            trace = {"u": u.reshape(action.shape)}
        log_prob, _ = self.log_prob(observation, action, trace)
        return Decisions(action.cpu().numpy(), log_prob.cpu().numpy(), {k: v.cpu().numpy() for k, v in trace.items()})

    def _sample(self, observation: Tree, rng: torch.Generator) -> tuple[Any, Tensor]:
        """SB3 samples from the global generator: lend it a seed from ours, and put it back as it was."""
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            distribution = self._distribution(observation)
            return distribution, distribution.sample()

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, [B, 1] each; without "u" in the trace it is recovered from the action.

        A squashed Gaussian has no closed entropy: the negative log-probability stands for it.
        """
        if not self.stochastic:
            zeros = torch.zeros(len(action), 1)
            return zeros, zeros
        distribution = self._distribution(observation)
        if self.squashed:
            u = trace["u"] if "u" in trace else self._unsquash(action)
            log_prob = distribution.log_prob(torch.tanh(u), u)
        else:
            taken = trace.get("u", action)
            binary = isinstance(self.action_space, spaces.MultiBinary)  # a Bernoulli counts in floats
            log_prob = distribution.log_prob(taken.float() if binary else taken)
        entropy = distribution.entropy()
        return log_prob[:, None], (-log_prob if entropy is None else entropy)[:, None]

    def _unsquash(self, action: Tensor) -> Tensor:
        raw = 2.0 * (action - self.low) / (self.high - self.low) - 1.0
        return torch.atanh(raw.clamp(-1 + 1e-6, 1 - 1e-6))

    def mode(self, observation: Tree) -> Tensor:
        """Deterministic action [B, A], or [B] of a discrete space."""
        return self._to_env(self.policy._predict(self._inputs(observation), deterministic=True))
