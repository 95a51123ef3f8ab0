"""Policies, one file each. Importing this package registers them; the engine finds them by id."""

if __name__ != "embodied_rft.agents":  # one module must have one name
    raise ImportError("import embodied_rft.agents, not agents")

from embodied_rft.registry import import_files

import_files(__name__, __path__)
