"""Images become tensors: the backbone's own processor, random changes for training, a dataset that decodes lazily.

Shapes: C channels, Y height, X width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pelton.errors import DataError, RecipeError
from pelton.tasks.pictures import Picture

Augment = Literal["none", "flip", "crop"]
SHIFT = 8
"""A crop moves the image by up to this part of its height and width (4 of 32 pixels, He et al. 2015, section 4.2)."""
HALF = (0.5, 0.5, 0.5)


class PlainProcessor:
    """Pillow's resizing with a mean and a deviation, for backbones whose own image processor cannot be loaded."""

    def __init__(
        self, height: int, width: int, mean: Sequence[float] = HALF, deviation: Sequence[float] = HALF
    ) -> None:
        """Resizes to `height` × `width`, then scales to `mean` 0 and `deviation` 1."""
        self.size = (width, height)
        self.mean, self.deviation = torch.tensor(mean).view(-1, 1, 1), torch.tensor(deviation).view(-1, 1, 1)

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> PlainProcessor:
        """Reads the size from the backbone's config, and mean and deviation where a preprocessor config is there."""
        from transformers import AutoConfig
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            values = ImageProcessingMixin.get_image_processor_dict(folder)[0]
        except (OSError, ValueError):
            values = {}
        size = getattr(AutoConfig.from_pretrained(folder), "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        return cls(height, width, values.get("image_mean") or HALF, values.get("image_std") or HALF)

    def __call__(self, image: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Returns `pixel_values` [1, C, Y, X] of one RGB image."""
        import numpy as np
        from PIL.Image import Resampling

        values = np.asarray(image.resize(self.size, Resampling.BILINEAR), dtype=np.float32) / 255.0  # [Y, X, C]
        pixels = torch.from_numpy(values).permute(2, 0, 1)
        return {"pixel_values": ((pixels - self.mean) / self.deviation).unsqueeze(0)}


def load_image_processor(load: Any) -> Any:
    """Loads the backbone's image processor on Pillow, which gives the same pixels with and without torchvision.

    Where there is none, or it runs on torchvision alone, `PlainProcessor` takes its place, and a warning says so.

    Raises:
        RecipeError: the backbone itself cannot be read.
    """
    from transformers import AutoImageProcessor

    try:
        return load(AutoImageProcessor, backend="pil")
    except RecipeError as error:
        plain = load(PlainProcessor)
        mean, deviation = plain.mean.flatten().tolist(), plain.deviation.flatten().tolist()
        warnings.warn(
            f"{error} Images are resized by Pillow to {plain.size[1]} × {plain.size[0]} pixels instead, with mean "
            f"{mean} and deviation {deviation}.",
            stacklevel=2,
        )
        return plain


def new_image_processor(config: Any) -> Any:
    """Makes the image processor of a new backbone: resized to its image size, pixels from −1 to 1.

    Raises:
        DataError: the backbone has no image size.
    """
    size = getattr(config, "image_size", None)
    if size is None:
        raise DataError(f"A new {config.model_type} has no image_size, so it reads no images. Name another type.")
    height, width = (size, size) if isinstance(size, int) else size
    return _resizing(height, width, HALF, HALF)


def exact_image_processor(processor: Any) -> Any:
    """Returns a processor that resizes whole images to the size that another gives, with its mean and deviation.

    Where every pixel counts nothing may be cropped, as many backbones' own processors do.
    """
    from transformers import ViTImageProcessorPil

    if isinstance(processor, PlainProcessor):
        (wide, high), mean, deviation = processor.size, processor.mean, processor.deviation
        return _resizing(high, wide, mean.flatten().tolist(), deviation.flatten().tolist())
    cropped = getattr(processor, "do_center_crop", False)
    size = dict(processor.crop_size if cropped else processor.size)
    height, width = (int(size.get(side) or size["shortest_edge"]) for side in ("height", "width"))
    if isinstance(processor, ViTImageProcessorPil) and not cropped:
        return processor
    return _resizing(height, width, list(processor.image_mean or HALF), list(processor.image_std or HALF))


def _resizing(height: int, width: int, mean: Sequence[float], deviation: Sequence[float]) -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=mean, image_std=deviation)


def require_patches(config: Any, processor: Any) -> None:
    """Raises DataError where a backbone's patch size does not divide the size that images are resized to."""
    patch, (height, width) = getattr(config, "patch_size", None), image_size(processor)
    if isinstance(patch, int) and (height % patch or width % patch):
        raise DataError(
            f"Images are resized to {height} × {width} pixels, and the patch size {patch} does not divide both. "
            f"Expected multiples of {patch}: choose another image_size or patch_size, or another backbone."
        )


def image_size(processor: Any) -> tuple[int, int]:
    """Returns the height and width that an exact processor resizes to."""
    return int(processor.size["height"]), int(processor.size["width"])


class ImageFeatures(Dataset[dict[str, Any]]):
    """Pictures that are decoded one by one when they are asked for.

    Random changes follow from the seed, the epoch and the place of the picture, whatever was asked for before: a
    resumed run sees what an uninterrupted one sees.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        processor: Any,
        labels: Sequence[int] | None = None,
        augment: Augment = "none",
        seed: int = 0,
    ) -> None:
        """Keeps where the pictures are, with their labels where they are to be learned."""
        self.pictures, self.processor, self.labels = pictures, processor, labels
        self.augment, self.seed, self.epoch = augment, seed, 0

    @property
    def column_names(self) -> list[str]:
        """What a feature holds."""
        return ["pixel_values"] if self.labels is None else ["pixel_values", "labels"]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the random changes; transformers' trainer calls it before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self.pictures)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Returns `pixel_values` [C, Y, X], and the label."""
        pixels = self.pixels(place)
        if self.augment != "none":
            pixels = change(pixels, self.augment, self.source(place))
        return (
            {"pixel_values": pixels} if self.labels is None else {"pixel_values": pixels, "labels": self.labels[place]}
        )

    def pixels(self, place: int) -> Tensor:
        """Decodes a picture, [C, Y, X], without random changes."""
        found = self.processor(self.pictures[place].decode(), return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(found, dtype=torch.float32)

    def source(self, place: int, use: int = 0) -> torch.Generator:
        """Returns where the random numbers of a picture come from in this epoch, by what they are used for."""
        return torch.Generator().manual_seed(hash((self.seed, self.epoch, place) + ((use,) if use else ())) % 2**63)


def change(pixels: Tensor, augment: Augment, source: torch.Generator) -> Tensor:
    """Mirrors an image [C, Y, X] half of the time; `crop` also shifts it, and mirrors what comes in at its edges."""
    if torch.rand((), generator=source) < 0.5:
        pixels = pixels.flip(-1)
    if augment != "crop":
        return pixels
    height, width = pixels.shape[-2:]
    down, right = height // SHIFT, width // SHIFT
    padded = torch.nn.functional.pad(pixels, (right, right, down, down), mode="reflect")
    top = int(torch.randint(2 * down + 1, (), generator=source))
    left = int(torch.randint(2 * right + 1, (), generator=source))
    return padded[:, top : top + height, left : left + width].contiguous()
