"""Semantic segmentation: a class for every pixel of an image, without torchvision.

Shapes: B batch, C channels, L classes, Y height, X width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.checked import IMAGES, check_pictures, find_pictures, named_pictures
from pelton.tasks.columns import pick_column
from pelton.tasks.labels import Labels
from pelton.tasks.masks import IGNORED, MASKS, MaskReader, RegionFeatures
from pelton.tasks.metrics import cross_entropy_sum, pixel_counts, region_metric_names, region_metrics
from pelton.tasks.pictures import Picture
from pelton.tasks.pixels import (
    Augment,
    exact_image_processor,
    load_image_processor,
    new_image_processor,
    require_patches,
)
from pelton.tasks.segmenters import Segmenter
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table


class SegmentationSettings(TaskSettings):
    """One of several classes for each pixel of an image.

    The rows are folders or zip archives that hold the folders `images` and `masks`, whose files have the same names, or
    tables with two paths (or bytes) in each row. A mask has the number of a class in each pixel.

    Attributes:
        image_column: Paths (beside the table's file) or bytes of images; found when not given.
        mask_column: Likewise of masks.
        class_names: Of the classes 0, 1, …; when not given those in `label_names.json` beside the data, or the numbers
            up to the highest in the training masks.
        ignore_class: The number of pixels without a label, which are neither learned nor judged.
        augment: Random changes of training images and their masks, new in each epoch: `flip` mirrors half of them,
            `crop` also shifts them by up to an eighth.
    """

    kind: Literal["semantic-segmentation"] = "semantic-segmentation"
    score: tuple[str, ...] = ("mean_iou",)
    image_column: str | None = None
    mask_column: str | None = None
    class_names: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    ignore_class: Annotated[int, Field(ge=0)] | None = None
    augment: Augment = "none"

    @model_validator(mode="after")
    def _no_class_each(self) -> Self:
        if self.shots is not None:
            raise ValueError("shots counts examples of each class, and an image has several: set examples instead")
        names = self.class_names or ()
        if len(set(names)) != len(names):
            raise ValueError(f"class_names must differ, but {sorted({n for n in names if names.count(n) > 1})} repeat")
        return self


@dataclass(frozen=True)
class Segmentation:
    """What a model says about one image.

    Attributes:
        image: Where it is.
        shares: Each class's share of the pixels.
        classes: The class of each pixel, [Y, X] of the image.
    """

    image: str
    shares: dict[str, float]
    classes: NDArray[np.integer] = field(repr=False)


@dataclass(frozen=True)
class SemanticSegmentation(Task[SegmentationSettings]):
    """Images with masks; both are decoded when a batch needs them, and never all held in memory.

    Logits are interpolated to each mask's own size before they are judged.
    """

    draws = True

    labels: Labels

    @classmethod
    def plan(cls, settings: SegmentationSettings, table: Table) -> Self:
        """Finds the columns, and the classes of the training masks."""
        image = pick_column(table, settings.image_column, IMAGES, "task.image_column", "the images")
        mask = pick_column(table, settings.mask_column, MASKS, "task.mask_column", "the masks")
        settings = settings.model_copy(update={"image_column": image, "mask_column": mask})
        names = settings.class_names or table.class_names.get(mask)
        if names is None:
            reader = MaskReader(None, settings.ignore_class)
            highest = max((int(reader.read(one).max(initial=-1)) for one in find_pictures(table, mask)), default=-1)
            names = tuple(str(number) for number in range(highest + 1))
        if len(names) < 2:
            raise DataError(
                f"{table.name}, column {mask!r}: expected two or more classes in the masks, but got {len(names)}. "
                "Name them with task.class_names, or give other masks."
            )
        return cls(settings, Labels(tuple(names), ids=True))

    @classmethod
    def restore(cls, settings: SegmentationSettings, stored: Mapping[str, Any]) -> Self:
        """Rebuilds the task with a run's classes."""
        return cls(settings, Labels.restored(stored))

    def stored(self) -> dict[str, Any]:
        """Returns the classes."""
        return self.labels.stored()

    @property
    def model_class(self) -> Any:
        """What transformers has for the backbone, or Pelton's head on it."""
        return Segmenter

    def model_options(self) -> dict[str, Any]:
        """Returns the classes, and the label that counts nowhere."""
        return {**self.labels.model_options(), "semantic_loss_ignore_index": IGNORED}

    def load_processor(self, load: Any) -> Any:
        """Loads the backbone's image processor, without its cropping."""
        from transformers import AutoConfig

        processor = exact_image_processor(load_image_processor(load))
        require_patches(load(AutoConfig), processor)
        return processor

    def make_processor(self, config: Any, examples: Examples) -> Any:
        """Makes one that resizes to the backbone's image size."""
        processor = new_image_processor(config)
        require_patches(config, processor)
        return processor

    @property
    def metrics(self) -> tuple[str, ...]:
        """Mean IoU, pixel accuracy, loss, and the IoU of each class."""
        return region_metric_names(self.labels.names)

    @property
    def reader(self) -> MaskReader:
        """What turns masks into labels."""
        return MaskReader(self.labels.names, self.settings.ignore_class)

    def check(self, table: Table) -> Examples:
        """Turns a table into examples, whose targets are the pictures of their masks.

        Raises:
            DataError: a column is missing; an image or mask is missing or cannot be decoded; a mask has another size
                than its image, or a class that does not exist.
        """
        inputs = self.check_inputs(table)
        targets = find_pictures(table, str(self.settings.mask_column))
        for row, (picture, mask) in enumerate(zip(inputs, targets, strict=True)):
            self.reader.check(mask, picture, table.where(row, str(self.settings.mask_column)))
        return Examples(inputs, targets)

    def check_inputs(self, table: Table) -> list[Picture]:
        """Finds the images alone, and decodes each once."""
        return check_pictures(table, str(self.settings.image_column))

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Picture]:
        """Takes texts as paths of image files."""
        return named_pictures(texts, pairs, "Semantic segmentation")

    def class_counts(self, targets: Sequence[Picture]) -> NDArray[np.integer]:
        """Counts the pixels of each class, [L]."""
        counts = np.zeros(len(self.labels), dtype=np.int64)
        for mask in targets:
            labels = self.reader.read(mask)
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        return counts

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Interpolates logits [B, L, y, x] to labels [B, Y, X], and puts the classes last: [B, Y, X, L]."""
        return F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear").permute(0, 2, 3, 1)

    def encode(self, inputs: Sequence[Picture], processor: Any, targets: Sequence[Picture] | None = None) -> Any:
        """Returns features that are decoded when asked for; with targets they are for training, and augmented.

        The random changes start from torch's seed, which is the run's own when its training is prepared.
        """
        augment: Augment = "none" if targets is None else self.settings.augment
        return RegionFeatures(inputs, processor, targets, self.reader, augment, torch.initial_seed())

    def collator(self, processor: Any) -> Collator:
        """Stacks images, and labels where there are any; all have one size."""
        from transformers import BatchFeature

        def collate(features: list[dict[str, Any]]) -> Any:
            return BatchFeature({key: torch.stack([row[key] for row in features]) for key in features[0]})

        return collate

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[NDArray[np.floating]]:
        """Returns logits [L, y, x] for each image, at the model's own resolution."""
        return list(model(**batch).logits.float().cpu().numpy())

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[NDArray[np.floating]]) -> dict[str, float]:
        """Computes the metrics of `metrics` over all labelled pixels of the set."""
        counts, loss = np.zeros((len(self.labels),) * 2, dtype=np.int64), 0.0
        for mask, logits in zip(examples.targets, outputs, strict=True):
            labels = self.reader.read(mask)
            wide = _resized(logits, labels.shape)
            counts += pixel_counts(labels, wide.argmax(axis=0), len(self.labels))
            loss += cross_entropy_sum(wide, labels)
        return region_metrics(counts, loss, self.labels.names)

    def predict(
        self, inputs: Sequence[Picture], features: Any, outputs: Sequence[NDArray[np.floating]]
    ) -> list[Segmentation]:
        """Returns each image's classes at its own size."""
        found = []
        for picture, logits in zip(inputs, outputs, strict=True):
            width, height = picture.decode().size
            classes = _resized(logits, (height, width)).argmax(axis=0)
            counts = np.bincount(classes.ravel(), minlength=len(self.labels)) / classes.size
            shares = dict(zip(self.labels.names, counts.tolist(), strict=True))
            found.append(Segmentation(str(picture), shares, classes))
        return found


def _resized(logits: NDArray[np.floating], size: Sequence[int]) -> NDArray[np.floating]:
    """Interpolates logits [L, y, x] to a size, [L, Y, X]."""
    wide = F.interpolate(torch.from_numpy(logits)[None], size=tuple(size), mode="bilinear")
    return wide[0].numpy()
