"""A plug-in of one file, for recipes that name one: a logger that counts lines."""

from pathlib import Path

from embodied_rft import Sink, register


@register("logger", "counting")
class Counting(Sink):
    """Writes how many lines there were.

    Args:
        by: what each line counts.
    """

    def __init__(self, folder, *, step, by=1):
        self.file, self.by, self.count = Path(folder) / "counted.json", by, 0

    def write(self, step, record):
        self.count += self.by

    def close(self):
        self.file.write_text(str(self.count))
