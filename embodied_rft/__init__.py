"""embodied_rft: take a policy that half works and make it reliable with reinforcement learning.

One rollout buffer and one learner serve small control policies, vision-language-action models, multi-turn agents and
text. `import embodied_rft.envs` registers the Gymnasium environments; everything else is found by id (`registry`).

What authors of plug-ins need can be imported from here, wherever it lives (`__all__`); each name is loaded when it is
first asked for, so that importing the package costs nothing.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embodied_rft.buffer.plans import Fresh as Fresh
    from embodied_rft.buffer.plans import Replay as Replay
    from embodied_rft.buffer.trajectories import write_trajectories as write_trajectories
    from embodied_rft.data import Batch as Batch
    from embodied_rft.data import Decisions as Decisions
    from embodied_rft.data import Field as Field
    from embodied_rft.data import Finding as Finding
    from embodied_rft.data import Ragged as Ragged
    from embodied_rft.data import Trajectory as Trajectory
    from embodied_rft.experience.curriculum import Curriculum as Curriculum
    from embodied_rft.learning.agent import Agent as Agent
    from embodied_rft.learning.objective import Losses as Losses
    from embodied_rft.learning.objective import Objective as Objective
    from embodied_rft.names import UserError as UserError
    from embodied_rft.networks.tensors import polyak as polyak
    from embodied_rft.objectives.common import annotate_returns as annotate_returns
    from embodied_rft.objectives.common import preset as preset
    from embodied_rft.objectives.common import segment_returns as segment_returns
    from embodied_rft.objectives.credit import Credit as Credit
    from embodied_rft.objectives.soft_actor_critic import SAC as SAC
    from embodied_rft.policy import Adapter as Adapter
    from embodied_rft.policy import Policy as Policy
    from embodied_rft.pools.incidents import Infrastructure as Infrastructure
    from embodied_rft.registry import register as register
    from embodied_rft.runs.recipe import load_recipe as load_recipe
    from embodied_rft.runs.sinks import Sink as Sink
    from embodied_rft.runs.trained import load_policy as load_policy
    from embodied_rft.seeding import held_out_index as held_out_index
    from embodied_rft.stages.base import Stage as Stage
    from embodied_rft.testing.check_env import check_env as check_env
    from embodied_rft.testing.check_policy import check_policy as check_policy

__version__ = "0.1.0"

# In a checkout envs/, agents/ and configs/ sit beside this package; in a wheel, inside it.
_here = Path(__file__).parent
if not (_here / "envs").is_dir():
    __path__.append(str(_here.parent))

_DOORS = {  # {module: what is imported from here}
    "buffer.plans": "Fresh Replay",
    "buffer.trajectories": "write_trajectories",
    "data": "Batch Decisions Field Finding Ragged Trajectory",
    "experience.curriculum": "Curriculum",
    "learning.agent": "Agent",
    "learning.objective": "Losses Objective",
    "names": "UserError",
    "networks.tensors": "polyak",
    "objectives.common": "annotate_returns preset segment_returns",
    "objectives.credit": "Credit",
    "objectives.soft_actor_critic": "SAC",
    "policy": "Adapter Policy",
    "pools.incidents": "Infrastructure",
    "registry": "register",
    "runs.recipe": "load_recipe",
    "runs.sinks": "Sink",
    "runs.trained": "load_policy",
    "seeding": "held_out_index",
    "stages.base": "Stage",
    "testing.check_env": "check_env",
    "testing.check_policy": "check_policy",
}
_WHERE = {name: module for module, names in _DOORS.items() for name in names.split()}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """The thing of that name, from where it is defined (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    """Whatever is loaded already, and what can be."""
    return sorted({*globals(), *__all__})
