"""What models make of images, to look at: masks in colours, overlays, reconstructions, and sheets of several.

Shapes: Y height, X width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pelton.errors import TrainingError
from pelton.tasks.base import Examples, as_json
from pelton.tasks.masked_images import Reconstruction
from pelton.tasks.pictures import Picture
from pelton.tasks.segmentation import Segmentation, SemanticSegmentation
from pelton.training.gate_values import spread
from pelton.training.run import Run

Colours = NDArray[np.uint8]
GAP, LINE, FONT = 6, 20, 13
"""Pixels: between two pictures, of a line of text, of its letters."""
UNLABELLED = (0, 0, 0)
STRENGTH = 0.55
"""How much of an overlay is the mask's colour."""


def palette(count: int) -> Colours:
    """Returns colours that are easy to tell apart, [count, 3]: matplotlib's tab20, strong ones first, or all hues."""
    from matplotlib import colormaps

    if count <= 20:
        wheel = np.asarray(colormaps["tab20"].colors)[[*range(0, 20, 2), *range(1, 20, 2)][:count]]  # type: ignore[attr-defined]
    else:
        wheel = colormaps["hsv"](np.arange(count) / count)[:, :3]
    return np.asarray(np.rint(wheel * 255), dtype=np.uint8)


def paint(classes: NDArray[np.integer], count: int) -> Colours:
    """Colours classes [Y, X] of so many, [Y, X, 3]; negative ones, which are no class, become black."""
    return np.concatenate([palette(count), [UNLABELLED]]).astype(np.uint8)[np.where(classes < 0, count, classes)]


def overlay(image: Colours, painted: Colours) -> Colours:
    """Lays a painted mask over its image, both [Y, X, 3]."""
    return np.rint((1 - STRENGTH) * image + STRENGTH * painted).astype(np.uint8)


def drawn(picture: Picture, prediction: Any) -> dict[str, Colours]:
    """Returns the pictures of a prediction by what they show; none where there is nothing to see.

    Args:
        picture: What the prediction is about.
        prediction: What the run's task said.
    """
    if isinstance(prediction, Segmentation):
        painted = paint(prediction.classes, len(prediction.shares))
        return {"mask": painted, "overlay": overlay(np.asarray(picture.decode()), painted)}
    if isinstance(prediction, Reconstruction):
        return {"input": prediction.original, "hidden": prediction.hidden, "reconstruction": prediction.rebuilt}
    return {}


def save_predictions(inputs: Sequence[Picture], predictions: Sequence[Any], folder: Path) -> list[Path]:
    """Writes `predictions.jsonl` and the pictures of each prediction, such as `NAME-mask.png`, and returns the paths.

    Images of one name are told apart by a number.

    Raises:
        TrainingError: the folder is a file.
    """
    if folder.is_file():
        raise TrainingError(f"{folder} is a file, but pictures need a folder. Choose another output.")
    folder.mkdir(parents=True, exist_ok=True)
    lines, written = [], [folder / "predictions.jsonl"]
    names = _told_apart([picture.stem for picture in inputs])
    for name, picture, prediction in zip(names, inputs, predictions, strict=True):
        lines.append(json.dumps(as_json(prediction), ensure_ascii=False) + "\n")
        for what, colours in drawn(picture, prediction).items():
            written.append(folder / f"{name}-{what}.png")
            Image.fromarray(colours).save(written[-1])
    written[0].write_text("".join(lines), encoding="utf-8")
    return written


def _told_apart(stems: Sequence[str]) -> list[str]:
    """Returns a name for each stem: the first of several alike keeps it, others get a number that is free."""
    taken, names, last = set(stems), list[str](), Counter[str]()
    for stem in stems:
        last[stem] += 1
        while last[stem] > 1 and f"{stem}-{last[stem]}" in taken:
            last[stem] += 1
        names.append(stem if last[stem] == 1 else f"{stem}-{last[stem]}")
        taken.add(names[-1])
    return names


def run_sheet(run: Run, count: int = 6) -> Image.Image:
    """Draws some of the examples that a run was judged by, a row each.

    For segmentation a row is the image, the truth and the prediction, and the last line says which colour is which
    class; for reconstruction it is the input, what the model sees of it, and what it makes of that.

    Args:
        run: A finished run.
        count: Rows; they are taken at equal distances.

    Raises:
        TrainingError: the run's task has nothing to see.
    """
    examples = spread(run.examples(), count)
    if not isinstance(run.task, SemanticSegmentation):
        rows = [drawn(p, found) for p, found in zip(examples.inputs, run.predict(examples.inputs), strict=True)]
        if not rows or not rows[0]:
            kind = run.task.settings.kind
            raise TrainingError(f"{run.folder.path} is a run of {kind}, of which there is nothing to see.")
        return sheet(list(rows[0]), [list(row.values()) for row in rows])
    return _regions(run.task, examples, run.predict)


def _regions(task: SemanticSegmentation, examples: Examples, predict: Callable[..., list[Any]]) -> Image.Image:
    names, rows = task.labels.names, []
    for picture, mask, found in zip(examples.inputs, examples.targets, predict(examples.inputs), strict=True):
        image = np.asarray(picture.decode())
        rows.append([image, *(paint(classes, len(names)) for classes in (task.reader.read(mask), found.classes))])
    return sheet(["image", "truth", "prediction"], rows, dict(zip(names, palette(len(names)), strict=True)))


def sheet(
    titles: Sequence[str], rows: Sequence[Sequence[Colours]], legend: dict[str, Any] | None = None
) -> Image.Image:
    """Lays pictures out in rows under titles, with a legend of colours below.

    Args:
        titles: One a column.
        rows: Pictures [Y, X, 3]; a column is as wide as its widest.
        legend: Colours by name.
    """
    widths = [max(row[column].shape[1] for row in rows) for column in range(len(titles))]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    width = sum(widths) + GAP * (len(widths) + 1)
    lines = _lines(legend or {}, width)
    page = Image.new("RGB", (width, LINE * (1 + len(lines)) + sum(heights) + GAP * (len(rows) + 1)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    left = GAP
    for column, title in enumerate(titles):
        pen.text((left, 3), title, fill="black", font=font)
        top = LINE
        for row, height in zip(rows, heights, strict=True):
            page.paste(Image.fromarray(row[column]), (left, top))
            top += height + GAP
        left += widths[column] + GAP
    for number, line in enumerate(lines):
        top = page.height - LINE * (len(lines) - number)
        for left, name, colour in line:
            pen.rectangle((left, top + 3, left + FONT, top + 3 + FONT), fill=tuple(int(c) for c in colour))
            pen.text((left + FONT + 4, top + 2), name, fill="black", font=font)
    return page


def _lines(legend: dict[str, Any], width: int) -> list[list[tuple[int, str, Any]]]:
    """Breaks a legend into lines of (left, name, colour) that fit a width."""
    lines: list[list[tuple[int, str, Any]]] = []
    font, left = ImageFont.load_default(FONT), width
    for name, colour in legend.items():
        size = FONT + 4 + round(font.getlength(name)) + 2 * GAP
        if left + size > width:
            lines.append([])
            left = GAP
        lines[-1].append((left, name, colour))
        left += size
    return lines
