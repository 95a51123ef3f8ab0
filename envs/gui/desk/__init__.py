"""An office of our own, as a page: log in, fill a form, file messages; what was done is read from the page's state."""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
