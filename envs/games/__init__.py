"""Games for agents that see pictures or read: cards, boards and mazes, batched in NumPy."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
