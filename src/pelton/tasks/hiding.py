"""Which patches of an image are hidden, and images as patches.

Shapes: B batch, C channels, Y height, X width, P patch size, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pelton.errors import DataError
from pelton.tasks.pixels import ImageFeatures, image_size, require_patches

KNOWN = ("recon", "vit_mae")
"""Types of models that take `noise`, hide the patches with the highest, and give `logits` and `mask`."""
HIDING = 1
"""What random numbers are drawn for, beside random changes."""


class PatchProcessor:
    """An image processor that knows how many patches its images have."""

    def __init__(self, processor: Any, config: Any) -> None:
        """Takes an exact processor and the backbone's config.

        Raises:
            DataError: the backbone is of a type that hides no patches, or its patches do not fit the images.
        """
        if config.model_type not in KNOWN:
            raise DataError(
                f"masked-images trains models that hide patches ({', '.join(KNOWN)}), but the backbone is "
                f"{config.model_type!r}. Name another backbone, such as new:recon."
            )
        require_patches(config, processor)
        height, width = image_size(processor)
        self.processor, self.patches = processor, (height // config.patch_size) * (width // config.patch_size)

    def __call__(self, image: Any, **options: Any) -> Any:
        """Returns what the processor says."""
        return self.processor(image, **options)

    def save_pretrained(self, folder: Any) -> None:
        """Saves the processor."""
        self.processor.save_pretrained(folder)


class MaskedFeatures(ImageFeatures):
    """Pictures with the noise that says which of their patches are hidden."""

    @property
    def column_names(self) -> list[str]:
        """What a feature holds."""
        return ["pixel_values", "noise"]

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Returns `pixel_values` [C, Y, X] and `noise` [N]."""
        noise = torch.rand(self.processor.patches, generator=self.source(place, HIDING))
        return {**super().__getitem__(place), "noise": noise}


def as_colours(pixels: NDArray[np.floating], processor: Any) -> NDArray[np.uint8]:
    """Turns pixels [C, Y, X] as the model gets them into colours [Y, X, C]."""
    mean, deviation = np.asarray(processor.image_mean), np.asarray(processor.image_std)
    values = np.rint((pixels.transpose(1, 2, 0) * deviation + mean) * 255)
    return np.asarray(np.clip(values, 0, 255), dtype=np.uint8)


def cut(images: Tensor, size: int) -> Tensor:
    """Cuts images [B, C, Y, X] into patches [B, N, P · P · C], channels last."""
    batch, channels, height, width = images.shape
    split = images.reshape(batch, channels, height // size, size, width // size, size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def join(patches: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """Puts patches [B, N, P · P · C] together again, to images of a shape [B, C, Y, X]."""
    batch, channels, height, width = shape
    laid = patches.reshape(batch, height // size, width // size, size, size, channels)
    return laid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
