"""The words of a recipe: each stage is one small class that changes the session's agent or buffer.

A stage has a `Config` (all its defaults), a `title` for the report, `prepare(session)`, which makes networks and must
give the same structure whenever it is called, and `run(session)`, which does the work in steps that call
`session.tick()` and keeps how far it is in `session.progress`. A stage that holds stages has `expand()` in place of
both.
"""

from embodied_rft.registry import import_files

import_files(__name__, __path__)
