"""Draws the learning curves of run folders as one SVG, for a light and a dark page.

    python docs/curves.py docs/resip.svg --steps 512000 "residual=runs/residual-*" "direct=runs/direct-*"

Every group of folders (at most three) is one colour, every folder one curve: success on sheet 1 over environment steps.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path

from embodied_rft.files import write_atomically
from embodied_rft.report.figures import Curve, learning_curves

CLASSES = ("after", "other", "train")
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #646b78; } .grid { stroke: #e2e3e0; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.after { fill: #1f6feb; } .line.after { fill: none; stroke: #1f6feb; }
.other { fill: #d9480f; } .line.other { fill: none; stroke: #d9480f; }
.train { fill: #8a94a6; } .line.train { fill: none; stroke: #8a94a6; }
@media (prefers-color-scheme: dark) {
  text { fill: #98a1af; } .grid { stroke: #2e333b; }
  .after { fill: #6ea8fe; } .line.after { stroke: #6ea8fe; } .other { fill: #ff8a50; } .line.other { stroke: #ff8a50; }
}
</style>"""


def curve_of(folder: Path, css: str, *, steps: int) -> Curve:
    """The points of one run: the base at 0, then its learning curve, spread evenly over `steps` environment steps."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "evaluations").glob("*.json")]
    points = sorted((one["decisions"], one["success"]) for one in files if one["sheet"] == 1)
    end = max(one["decisions"] for one in files)
    start = min(one["decisions"] for one in files)
    x = [steps * (decisions - start) / (end - start) for decisions, _ in points]
    return Curve(folder.name, x, [success for _, success in points], css)


def main() -> None:
    """Read the folders, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("groups", nargs="+", help="NAME=GLOB of run folders")
    parser.add_argument("--steps", type=int, required=True, help="environment steps of the fine-tuning stage")
    options = parser.parse_args()
    curves, legend = [], []
    for index, (group, css) in enumerate(zip(options.groups, CLASSES)):
        name, _, pattern = group.partition("=")
        curves += [curve_of(folder, css, steps=options.steps) for folder in sorted(Path().glob(pattern))]
        legend.append(f'<text class="{css}" x="56" y="{30 + 16 * index}">{escape(name)}</text>')
    picture = str(learning_curves(curves, x_label="environment steps", x_format=lambda x: f"{x / 1000:g}k"))
    picture = picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, close, rest = picture.partition(">")
    write_atomically(options.out, head + close + STYLE + rest.removesuffix("</svg>") + "".join(legend) + "</svg>\n")


if __name__ == "__main__":
    main()
