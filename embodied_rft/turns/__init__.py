"""Decisions that are texts: how an answer is read, what it names, states that are gone back to."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
