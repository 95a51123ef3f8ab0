"""Environments of other packages as agents meet them: grids, arcade games, Crafter, text games, servers of OpenEnv."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
