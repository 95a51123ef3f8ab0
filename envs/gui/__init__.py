"""Pages and screens for agents that click and type: in a real browser, or drawn without one."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
