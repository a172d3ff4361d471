"""Tiny street scenes: coloured bands with masks that follow from the colours, in folders or zips."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("sky", "wall", "road")
COLOURS = np.array([[60, 120, 230], [180, 60, 40], [70, 70, 75], [250, 250, 250]], dtype=np.int64)
UNLABELLED = 3
SIZE = (24, 36)
COUNTS = {"train": 8, "validation": 3, "test": 4}


def scene(seed: int) -> tuple[Image.Image, Image.Image]:
    """An image [24, 36] of three bands with a white patch that has no label, and its mask."""
    g = np.random.default_rng(seed)
    first, second = g.integers(5, 9), g.integers(13, 18)
    classes = np.zeros(SIZE, dtype=np.int64)
    classes[first:], classes[second:] = 1, 2
    classes[second : second + 3, 4:9] = UNLABELLED
    pixels = np.clip(COLOURS[classes] + g.integers(-12, 12, (*SIZE, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(classes.astype(np.uint8))


def save_scenes(folder: Path, zipped: bool = False) -> Path:
    for number, (split, count) in enumerate(COUNTS.items()):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(count):
            image, mask = scene(100 * number + index)
            image.save(folder / split / "images" / f"{index:03}.png")
            mask.save(folder / split / "masks" / f"{index:03}.png")
        if zipped:
            with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
                for file in sorted((folder / split).rglob("*.png")):
                    archive.write(file, file.relative_to(folder / split))
            (folder / split).rename(folder.parent / f"was-{split}")
    return folder
