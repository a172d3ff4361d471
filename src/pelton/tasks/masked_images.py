"""Reconstruction: a part of each image's patches is hidden, and the model says what they show.

Training hides other patches in every epoch. Evaluation hides the same ones always: they follow from the seed in the
settings and the image's place in its split, so that losses of two models can be compared.

Shapes: C channels, Y height, X width, P patch size, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.checked import IMAGES, check_pictures, named_pictures
from pelton.tasks.columns import pick_column
from pelton.tasks.hiding import MaskedFeatures, PatchProcessor, as_colours, cut, join
from pelton.tasks.pictures import Picture
from pelton.tasks.pixels import Augment, exact_image_processor, load_image_processor, new_image_processor
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table

TINY = 1e-6


class MaskedImageSettings(TaskSettings):
    """What hidden patches of an image show.

    The rows are images: folders or zip archives with one folder or more of them, or tables with a path or bytes in each
    row. Labels and masks beside them are left alone.

    Attributes:
        image_column: Paths (beside the table's file) or bytes of images; found when not given.
        mask_ratio: Share of the patches that is hidden; what the backbone's config says when not given.
        normalise: Whether the loss scales each patch to mean 0 and deviation 1; likewise.
        mask_seed: Of the patches that evaluation hides.
        augment: Random changes of training images, new in each epoch: `flip` mirrors half of them, `crop` also shifts
            them by up to an eighth.
    """

    kind: Literal["masked-images"] = "masked-images"
    score: tuple[str, ...] = ("loss",)
    image_column: str | None = None
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    normalise: bool | None = None
    mask_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    augment: Augment = "none"

    @model_validator(mode="after")
    def _no_classes(self) -> Self:
        if self.shots is not None:
            raise ValueError("shots counts examples of each class, and images have none here: set examples instead")
        return self


@dataclass(frozen=True)
class Reconstruction:
    """What a model makes of one image: the error of the hidden patches, and pictures.

    Attributes:
        image: Where it is.
        loss: As the model computes it.
        original: The image as the model gets it, [Y, X, 3].
        hidden: Likewise, with hidden patches grey.
        rebuilt: Likewise, with hidden patches as the model sees them.
    """

    image: str
    loss: float
    original: NDArray[np.uint8] = field(repr=False)
    hidden: NDArray[np.uint8] = field(repr=False)
    rebuilt: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Rebuilt:
    """What is kept of a forward for one image: its loss, its pixels [C, Y, X], and which of them are hidden [Y, X]."""

    loss: float
    pixels: NDArray[np.float16]
    hidden: NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedImages(Task[MaskedImageSettings]):
    """Images of which a part is hidden; they are decoded when a batch needs them."""

    new_head = False
    draws = True

    @classmethod
    def plan(cls, settings: MaskedImageSettings, table: Table) -> Self:
        """Finds the column."""
        image = pick_column(table, settings.image_column, IMAGES, "task.image_column", "the images")
        return cls(settings.model_copy(update={"image_column": image}))

    @property
    def model_class(self) -> Any:
        """What transformers knows for pretraining."""
        from transformers import AutoModelForPreTraining

        return AutoModelForPreTraining

    def model_options(self) -> dict[str, Any]:
        """Returns how much is hidden, and what the loss compares, where the settings say so."""
        values = {"mask_ratio": self.settings.mask_ratio, "norm_pix_loss": self.settings.normalise}
        return {key: value for key, value in values.items() if value is not None}

    def load_processor(self, load: Any) -> Any:
        """Loads the backbone's image processor, without its cropping."""
        from transformers import AutoConfig

        return PatchProcessor(exact_image_processor(load_image_processor(load)), load(AutoConfig))

    def make_processor(self, config: Any, examples: Examples) -> Any:
        """Makes one that resizes to the backbone's image size."""
        return PatchProcessor(new_image_processor(config), config)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The loss."""
        return ("loss",)

    def check(self, table: Table) -> Examples:
        """Turns a table into examples, which have no targets.

        Raises:
            DataError: the column is missing, or an image is missing or cannot be decoded.
        """
        found = self.check_inputs(table)
        return Examples(found, [None] * len(found))

    def check_inputs(self, table: Table) -> list[Picture]:
        """Finds the images, and decodes each once."""
        return check_pictures(table, str(self.settings.image_column))

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Picture]:
        """Takes texts as paths of image files."""
        return named_pictures(texts, pairs, "Reconstruction")

    def encode(self, inputs: Sequence[Picture], processor: Any, targets: Sequence[None] | None = None) -> Any:
        """Returns features that are decoded when asked for; with targets they are for training.

        The random numbers of training start from torch's seed, which is the run's own when its training is prepared.
        """
        if targets is None:
            return MaskedFeatures(inputs, processor, seed=self.settings.mask_seed)
        return MaskedFeatures(inputs, processor, None, self.settings.augment, torch.initial_seed())

    def collator(self, processor: Any) -> Collator:
        """Stacks images, which all have one size, and their noise."""
        from transformers import BatchFeature

        def collate(features: list[dict[str, Any]]) -> Any:
            return BatchFeature({key: torch.stack([row[key] for row in features]) for key in features[0]})

        return collate

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Rebuilt]:
        """Returns the loss and the pixels of each image; all images hide as many patches."""
        pixels, found = batch["pixel_values"], model(**batch)
        patches, shape = found.logits.float(), pixels.shape
        size = round((patches.shape[-1] / shape[1]) ** 0.5)
        true = cut(pixels.float(), size)
        if model.config.norm_pix_loss:
            mean, variance = true.mean(dim=-1, keepdim=True), true.var(dim=-1, keepdim=True)
            patches = patches * (variance + TINY).sqrt() + mean
            error = (found.logits.float() - (true - mean) / (variance + TINY).sqrt()).square().mean(dim=-1)
        else:
            error = (patches - true).square().mean(dim=-1)  # [B, N]
        mask = found.mask.float()
        losses = (error * mask).sum(dim=1) / mask.sum(dim=1)
        whole = join(torch.where(mask[..., None] > 0, patches, true), shape, size).cpu().numpy().astype(np.float16)
        hidden = join(mask[..., None].expand_as(true), shape, size)[:, 0].cpu().numpy() > 0
        return [Rebuilt(*one) for one in zip(losses.tolist(), whole, hidden, strict=True)]

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Rebuilt]) -> dict[str, float]:
        """Computes the mean squared error of all hidden patches of the set."""
        return {"loss": float(np.mean([one.loss for one in outputs]))}

    def predict(self, inputs: Sequence[Picture], features: Any, outputs: Sequence[Rebuilt]) -> list[Reconstruction]:
        """Returns the loss and the pictures of each image."""
        found = []
        for place, (picture, one) in enumerate(zip(inputs, outputs, strict=True)):
            original = as_colours(features.pixels(place).numpy(), features.processor.processor)
            hidden = np.where(one.hidden[..., None], np.uint8(128), original)
            rebuilt = as_colours(one.pixels.astype(np.float32), features.processor.processor)
            found.append(Reconstruction(str(picture), one.loss, original, hidden, rebuilt))
        return found
