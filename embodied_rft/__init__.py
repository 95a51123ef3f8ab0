"""embodied_rft: take a policy that half works and make it reliable with reinforcement learning.

One rollout buffer and one learner serve small control policies, vision-language-action models, multi-turn agents and
text. `import embodied_rft.envs` registers the Gymnasium environments; everything else is found by id (`registry`).
"""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout envs/, agents/ and configs/ sit beside this package; in a wheel, inside it.
_here = Path(__file__).parent
if not (_here / "envs").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    """`from embodied_rft import load_policy`, without what that needs when only the package is imported."""
    if name == "load_policy":
        from embodied_rft.runs.trained import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
