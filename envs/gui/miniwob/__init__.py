"""The pages of MiniWoB++ (the package `miniwob`): tasks, rewards and success, demonstrators."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
