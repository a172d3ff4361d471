"""How open each method is in each block: the table of a run, and its heat map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pelton.errors import TrainingError
from pelton.training.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The columns of a summary that are not methods.
FIXED = ("index", "block", "original", "sum", "requires_grad", "is_buffer")


def gate_table(run: Path | str) -> pd.DataFrame:
    """Reads a run's gates: one row per block with each method's mean effective weight, their sum, and the gate's kind.

    Raises:
        TrainingError: the folder is not a run, its table is broken, or it has no gates since nothing was attached or
            training did not end.
    """
    folder = RunFolder.open(Path(run))
    if not folder.gate_values.is_file():
        raise TrainingError(
            f"{run} has no gates.json ({folder.phase}): either no adapter was trained, or not to the end."
        )
    rows = folder.read("gates")
    if not (
        isinstance(rows, list) and rows and all(isinstance(row, dict) and {"block", "sum"} <= set(row) for row in rows)
    ):
        raise folder.broken("gates.json", "expected one row for each block, with its gates and their sum")
    return pd.DataFrame(rows)


def methods_of(table: pd.DataFrame) -> list[str]:
    """Returns the names of the methods in a summary, in its order."""
    return [str(column) for column in table.columns if column not in FIXED]


def block_labels(table: pd.DataFrame) -> list[str]:
    """Returns the blocks' names without what all of them share: `encoder.layer.3` becomes `3`."""
    parts = [str(name).split(".") for name in table["block"]]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def plot_gates(table: pd.DataFrame, path: Path | str) -> None:
    """Draws the heat map block × method as a picture, by the suffix of `path` (PNG, SVG, PDF).

    Raises:
        TrainingError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    methods, blocks = methods_of(table), block_labels(table)
    # Agg draws without a display. Inches: a cell is wide enough for "0.00".
    figure = Figure(figsize=(1.6 + 0.85 * len(methods), 1.0 + 0.32 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    _draw_cells(axes, table[methods])
    axes.set_xticks(range(len(methods)), methods)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_ylabel("block")
    axes.set_title("mean gate value", fontsize="medium", loc="left")
    axes.tick_params(length=0)
    axes.xaxis.tick_bottom()
    axes.spines[:].set_visible(False)
    try:
        figure.savefig(path, dpi=160)
    except ValueError as error:
        raise TrainingError(f"{path} cannot be drawn: {error}") from error


def _draw_cells(axes: Axes, values: pd.DataFrame) -> None:
    """Colours every cell from 0 to 1 and writes its value; viridis grows lighter evenly, also to colour-blind eyes."""
    axes.imshow(values.to_numpy(dtype=float), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    for row, cells in enumerate(values.to_numpy(dtype=float)):
        for column, value in enumerate(cells):
            if value == value:  # a method that this block lacks has no number
                ink = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize="small")
    axes.set_xticks([x - 0.5 for x in range(1, values.shape[1])], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, values.shape[0])], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
