"""What to learn: each objective is a short composition of `losses` with a config of its own, found by id.

Importing this package registers them. An objective never owns a loop: the `Learner` steps its losses in order.
"""

from collections.abc import Mapping
from typing import Any

from embodied_rft.learning.objective import Objective
from embodied_rft.options import validate_plugin_config
from embodied_rft.registry import find, import_files

import_files(__name__, __path__)


def build_objective(spec: str | Mapping[str, Any]) -> Objective:
    """The objective that "sac" or {"id": "sac", "gamma": 0.98} describes, without networks: `setup` makes those.

    Raises:
        ValueError: the class found by this id is no `Objective`.
        ConfigError: unknown id or option, with the nearest known one.
    """
    options = {"id": spec} if isinstance(spec, str) else dict(spec)
    id = str(options.pop("id", ""))
    config = validate_plugin_config("objective", id, options)
    made: Objective = find("objective", id)(config)
    return made
