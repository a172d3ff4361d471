"""Masks become labels: read, checked against their image and the classes, resized and changed together with it.

Shapes: C channels, Y height, X width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pelton.errors import DataError
from pelton.tasks.pictures import Picture
from pelton.tasks.pixels import Augment, ImageFeatures, change

MASKS = ("mask", "annotation", "segmentation_mask", "label_map", "mask_path")
"""What columns of masks are called."""
IGNORED = -100


@dataclass(frozen=True)
class MaskReader:
    """Reads labels off masks.

    Attributes:
        names: Of the classes; None takes every number for one.
        ignored: The number that stands for no class.
    """

    names: Sequence[str] | None
    ignored: int | None

    def read(self, mask: Picture) -> NDArray[np.integer]:
        """Returns the class of every pixel, [Y, X], −100 where it has none.

        Raises:
            DataError: the mask is missing or broken, or has a number that is no class.
        """
        found = mask.classes()
        found = np.where(found == self.ignored, IGNORED, found) if self.ignored is not None else found
        if self.names is not None and found.max(initial=-1) >= len(self.names):
            row, column = (int(place) for place in np.argwhere(found >= len(self.names))[0])
            number, last = int(found[row, column]), len(self.names) - 1
            but = "" if self.ignored is None else f", or {self.ignored} for no class"
            raise DataError(
                f"{mask}: class {number} at row {row}, column {column}, but there are {len(self.names)} classes. "
                f"Expected 0 to {last} ({self.names[0]} to {self.names[-1]}){but}. Correct the mask, name the class in "
                f"task.class_names, or set task.ignore_class={number}."
            )
        return found

    def check(self, mask: Picture, image: Picture, where: str) -> None:
        """Reads a mask once, and measures it against its image.

        Raises:
            DataError: as `read`, or the sizes differ; `where` is what errors call the mask's cell.
        """
        try:
            height, width = self.read(mask).shape
        except DataError as error:
            raise (error if mask.data is not None else DataError(f"{where}: {error}")) from error
        columns, rows = image.decode().size
        if (rows, columns) != (height, width):
            raise DataError(
                f"{where}: {mask} has {height} × {width} pixels, but its image {image} has {rows} × {columns}. "
                "Expected one size: save the mask at the image's."
            )


class RegionFeatures(ImageFeatures):
    """Pictures and their masks, decoded when they are asked for, which change together."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        processor: Any,
        masks: Sequence[Picture] | None,
        reader: MaskReader,
        augment: Augment = "none",
        seed: int = 0,
    ) -> None:
        """Keeps where pictures and masks are."""
        super().__init__(pictures, processor, None, augment, seed)
        self.masks, self.reader = masks, reader

    @property
    def column_names(self) -> list[str]:
        """What a feature holds."""
        return ["pixel_values"] if self.masks is None else ["pixel_values", "labels"]

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Returns `pixel_values` [C, Y, X], and the labels [Y, X]."""
        pixels = self.pixels(place)
        if self.masks is None:
            return {"pixel_values": pixels}
        labels = resized(self.reader.read(self.masks[place]), (pixels.shape[1], pixels.shape[2]))
        both = torch.cat([pixels, torch.from_numpy(labels)[None].to(pixels.dtype)])  # small numbers: exact in float32
        if self.augment != "none":
            both = change(both, self.augment, self.source(place))
        return {"pixel_values": both[:-1].contiguous(), "labels": both[-1].long()}


def resized(labels: NDArray[np.integer], size: tuple[int, int]) -> NDArray[np.integer]:
    """Takes for each pixel of another size [Y, X] the label that is nearest."""
    height, width = size
    return np.array(Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST))
