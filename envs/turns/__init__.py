"""Any environment as a conversation: its state told in words, its actions read from text."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
