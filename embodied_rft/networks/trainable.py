"""Which weights of a policy are trained: all, low-rank adapters, the head, or none; one word for every policy.

Boundary: marks weights of modules and adds adapters, in place; which ones a policy chooses is `policy.Policy.select`.
peft is imported when the first adapter is made.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from embodied_rft.names import UserError, nearest
from embodied_rft.networks.encoder import Encoder
from embodied_rft.options import STRICT, refuse_idle

Train = Literal["full", "lora", "lora+head", "head", "frozen"]
WORDS: tuple[Train, ...] = get_args(Train)
M = TypeVar("M", bound=nn.Module)


@dataclass(config=STRICT, kw_only=True)
class LoraOptions:
    """Low-rank adapters (Hu et al. 2022, eq. 3), through peft. They start as nothing."""

    rank: int = 16  # of the adapters
    alpha: int = 32  # the update is scaled by alpha / rank
    targets: str | tuple[str, ...] = "all-linear"  # names of the adapted layers; the output layer is never one

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        if self.rank < 1 or self.alpha < 1:
            raise UserError(f"rank and alpha of adapters are at least 1, given rank {self.rank}, alpha {self.alpha}")


def refuse_idle_beside(config: Any, *full: str) -> None:
    """Refuse options of an agent that have no effect with its `train`: `lora`, and those that are of "full" alone."""
    if "lora" not in config.train:
        refuse_idle(config, ["lora"], f"with train {config.train!r} (a stage `adapt` has options of its own)")
    if config.train != "full":
        refuse_idle(config, full, f"with train {config.train!r}")


def linear_layers(module: nn.Module) -> dict[str, Any]:
    """All plain linear layers by their names, GPT-2's (transposed) among them; a router of experts is none."""
    found = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    return {n: m for n, m in found.items() if "router" not in type(m).__name__.lower()}


def adapters_of(module: nn.Module) -> list[nn.Parameter]:
    """The weights of the adapters somewhere inside."""
    return [weight for name, weight in module.named_parameters() if "lora_" in name]


def add_adapters(module: nn.Module, lora: LoraOptions, rng: torch.Generator, *, layers: set[str] | None = None) -> None:
    """Put adapters on the linear layers of a module, in place, and train nothing else of it.

    Args:
        module: whose forward pass stays the same to the bit, since adapters start as nothing.
        lora: their size, and the last parts of the names of the layers that get one.
        rng: draws their weights.
        layers: names of the layers that may get one; None: all linear layers.

    Raises:
        ValueError: peft is missing, or no layer is left.
    """
    try:
        import peft
    except ImportError:
        raise UserError('adapters need the package peft: pip install "embodied-rft[lora]"') from None
    names = sorted(linear_layers(module) if layers is None else layers)
    if not names:
        raise UserError(f"{type(module).__name__} has no linear layer that could get an adapter")
    chosen = names
    if lora.targets != "all-linear":
        wanted = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
        chosen = [n for n in names if any(n == t or n.endswith(f".{t}") for t in wanted)]
        for target in wanted:
            if not any(n == target or n.endswith(f".{target}") for n in names):
                raise UserError(
                    f"no linear layer is named {target!r}; {nearest(target, {n.split('.')[-1] for n in names})}"
                )
    pattern = "|".join(re.escape(f"of.{n}") for n in chosen)  # a whole name: an equal ending elsewhere is not meant
    transposed = all(type(module.get_submodule(n)).__name__ == "Conv1D" for n in chosen)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=pattern, lora_dropout=0.0, fan_in_fan_out=transposed
    )
    with torch.random.fork_rng(devices=[]):  # peft draws weights from the global generator
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
        # In a box without a configuration: peft would rewrite names of layers of models that it knows.
        peft.inject_adapter_in_model(config, nn.ModuleDict({"of": module}))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged(module: M) -> M:
    """A copy without adapters, what they have learned added to the weights; a library can save and load it."""
    module = copy.deepcopy(module)
    adapted = [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "get_base_layer")]
    for name, layer in adapted:
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())
    for layer in module.modules():
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            layer.__dict__.pop(attribute, None)
    return module


def freeze(policy: M) -> M:
    """The policy without gradient, in evaluation mode, and with statistics that stay as they are."""
    policy.requires_grad_(False)
    policy.eval()
    for module in policy.modules():
        if isinstance(module, Encoder):
            module.frozen = True
    return policy
