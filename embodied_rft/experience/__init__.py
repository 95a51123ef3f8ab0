"""A policy meets environments: collect, demonstrate, recut into chunks."""
