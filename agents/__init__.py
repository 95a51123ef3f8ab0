"""Policies, one file each. Importing this package registers them; the engine finds them by id."""

import importlib
import pkgutil

if __name__ != "embodied_rft.agents":  # one module must have one name
    raise ImportError("import embodied_rft.agents, not agents")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
