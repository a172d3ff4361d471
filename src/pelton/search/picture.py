"""An architecture as a picture: a row for each block, a column for each method, size by shade."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pelton.anatomy import Anatomy
from pelton.errors import TrainingError
from pelton.methods import MethodSpec
from pelton.search.architecture import Architecture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTHING = 0.0
"""The shade of a method that a block does not have."""
FAINTEST = 0.25
"""The shade of the smallest size: told apart from nothing."""


def draw_architecture(architecture: Architecture, anatomy: Anatomy, path: Path | str) -> None:
    """Draws an architecture, by the suffix of `path` (PNG, SVG, PDF).

    Raises:
        TrainingError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    methods, blocks = architecture.methods, anatomy.blocks
    # Agg draws without a display. Inches: a cell is wide enough for "rank 64".
    figure = Figure(figsize=(1.6 + 0.95 * len(methods), 1.1 + 0.32 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    shades = [[shade(architecture, spec, block.index) for spec in methods] for block in blocks]
    axes.imshow(shades, cmap="Blues", vmin=0.0, vmax=1.15, aspect="auto")
    for row, block in enumerate(blocks):
        for column, spec in enumerate(methods):
            _write(axes, column, row, label(architecture, spec, block.index), shades[row][column])
    axes.set_xticks(range(len(methods)), [spec.kind for spec in methods])
    axes.set_yticks(range(len(blocks)), [str(block.index) for block in blocks])
    axes.set_ylabel("block")
    axes.set_title(f"{architecture.parameters(anatomy):,} parameters", fontsize="medium", loc="left")
    _grid(axes, len(methods), len(blocks))
    try:
        figure.savefig(path, dpi=160)
    except ValueError as error:
        raise TrainingError(f"{path} cannot be drawn: {error}") from error


def shade(architecture: Architecture, spec: MethodSpec, block: int) -> float:
    """Returns how large a method is in a block, from 0 (not there) to 1 (as large as it may be)."""
    here = architecture.blocks.get(block, {})
    if spec.kind not in here:
        return NOTHING
    size = here[spec.kind]
    share = 1.0 if size is None else size / getattr(spec, str(spec.size))
    return FAINTEST + (1 - FAINTEST) * float(share)


def label(architecture: Architecture, spec: MethodSpec, block: int) -> str:
    """Returns the size of a method in a block as text: a dot where it has one size, nothing where it is not there."""
    here = architecture.blocks.get(block, {})
    if spec.kind not in here:
        return ""
    size = here[spec.kind]
    return "•" if size is None else str(size)


def _write(axes: Axes, column: int, row: int, text: str, depth: float) -> None:
    ink = "white" if depth > 0.65 else "black"
    axes.text(column, row, text, ha="center", va="center", color=ink, fontsize="small")


def _grid(axes: Axes, columns: int, rows: int) -> None:
    axes.tick_params(length=0)
    axes.xaxis.tick_bottom()
    axes.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
    axes.grid(which="minor", color="#d0d0d0", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
