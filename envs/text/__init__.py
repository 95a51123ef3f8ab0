"""Problems whose answers are texts: tasks, rules that judge, demonstrators."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
