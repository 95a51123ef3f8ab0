"""Placeholder until the next commit."""


class WorkerPool:
    """Not there yet."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError
