"""Image classification: one of several classes for an image, without torchvision."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.checked import IMAGES, check_pictures, named_pictures
from pelton.tasks.columns import LABELS, pick_column
from pelton.tasks.labels import Labels, find_labels
from pelton.tasks.metrics import class_metric_names, class_metrics, softmax
from pelton.tasks.pictures import Picture
from pelton.tasks.pixels import Augment, ImageFeatures, load_image_processor, new_image_processor
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table


class ImageSettings(TaskSettings):
    """One of several classes for an image.

    The rows are folders or zip archives with one folder a class, or tables with a path or bytes in each row.

    Attributes:
        image_column: Paths (beside the table's file) or bytes of images; found when not given.
        label_column: The column of the label; found when not given.
        augment: Random changes of training images, new in each epoch: `flip` mirrors half of them, `crop` also shifts
            them by up to an eighth.
    """

    kind: Literal["image-classification"] = "image-classification"
    score: tuple[str, ...] = ("accuracy",)
    image_column: str | None = None
    label_column: str | None = None
    augment: Augment = "none"


@dataclass(frozen=True)
class ImagePrediction:
    """What a model says about one image: the likeliest class, and every class's probability."""

    image: str
    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class ImageClassification(Task[ImageSettings]):
    """Images with one class each; they are decoded when a batch needs them, and never all held in memory."""

    labels: Labels

    @classmethod
    def plan(cls, settings: ImageSettings, table: Table) -> Self:
        """Finds the columns, and the classes of the training rows."""
        image = pick_column(table, settings.image_column, IMAGES, "task.image_column", "the images")
        label = pick_column(table, settings.label_column, LABELS, "task.label_column", "the label")
        settings = settings.model_copy(update={"image_column": image, "label_column": label})
        return cls(settings, find_labels(table, label))

    @classmethod
    def restore(cls, settings: ImageSettings, stored: Mapping[str, Any]) -> Self:
        """Rebuilds the task with a run's classes."""
        return cls(settings, Labels.restored(stored))

    def stored(self) -> dict[str, Any]:
        """Returns the classes."""
        return self.labels.stored()

    @property
    def model_class(self) -> Any:
        """The image classifier of transformers."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def model_options(self) -> dict[str, Any]:
        """Returns the classes."""
        return self.labels.model_options()

    def load_processor(self, load: Any) -> Any:
        """Loads the backbone's image processor, or a plain one with a warning."""
        return load_image_processor(load)

    def make_processor(self, config: Any, examples: Examples) -> Any:
        """Makes one that resizes to the backbone's image size."""
        return new_image_processor(config)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Accuracy, macro F1 and loss; with two classes F1, Matthews and the area under the curve."""
        return class_metric_names(len(self.labels))

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, a label is unseen, or an image is missing or cannot be decoded.
        """
        targets = self.labels.encode(table, str(self.settings.label_column))
        return Examples(self.check_inputs(table), targets)

    def check_inputs(self, table: Table) -> list[Picture]:
        """Finds the images alone, and decodes each once, so that a broken one is known before anything is trained."""
        return check_pictures(table, str(self.settings.image_column))

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Picture]:
        """Takes texts as paths of image files."""
        return named_pictures(texts, pairs, "Image classification")

    def strata(self, examples: Examples) -> list[Hashable]:
        """Returns the classes."""
        return list(examples.targets)

    def classes(self, examples: Examples) -> tuple[str, set[Any]]:
        """Returns the label column and the classes that occur."""
        return str(self.settings.label_column), set(examples.targets)

    def encode(self, inputs: Sequence[Picture], processor: Any, targets: Sequence[int] | None = None) -> ImageFeatures:
        """Returns features that are decoded when asked for; with targets they are for training, and augmented.

        The random changes start from torch's seed, which is the run's own when its training is prepared.
        """
        augment: Augment = "none" if targets is None else self.settings.augment
        return ImageFeatures(inputs, processor, targets, augment, torch.initial_seed())

    def collator(self, processor: Any) -> Collator:
        """Stacks images, which all have one size, and labels."""
        from transformers import BatchFeature

        def collate(features: list[dict[str, Any]]) -> Any:
            batch = {"pixel_values": torch.stack([row["pixel_values"] for row in features])}
            if "labels" in features[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in features])
            return BatchFeature(batch)

        return collate

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Returns logits [classes] for each image."""
        return list(model(**batch).logits.float().cpu().numpy())

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of `metrics`."""
        return class_metrics(np.asarray(outputs), np.asarray(examples.targets))

    def predict(self, inputs: Sequence[Picture], features: Any, outputs: Sequence[Any]) -> list[ImagePrediction]:
        """Returns the classes by probability."""
        names = self.labels.names
        return [
            ImagePrediction(str(picture), names[int(row.argmax())], dict(zip(names, row.tolist(), strict=True)))
            for picture, row in zip(inputs, softmax(np.asarray(outputs)), strict=True)
        ]
