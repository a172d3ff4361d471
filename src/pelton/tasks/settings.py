"""What a recipe says about its task."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class TaskSettings(BaseModel):
    """Text or text-pair classification: where the rows are, which columns matter, how much of them is used.

    Attributes:
        kind: The kind of task.
        data: A folder with one file per split, a file of training rows, a name on the hub, or `pelton:banking77`.
        subset: The configuration of a hub data set, such as `mrpc` of `nyu-mll/glue`.
        train: The split, or file, with the training rows; found by its usual names when not given.
        validation: Likewise; rows are held back from training when there is none.
        test: Likewise; never used for training or selection.
        text_columns: One column, or two for pairs; found when not given.
        label_column: The column of the label; found when not given.
        shots: Training examples kept for each class; all when not given.
        validation_fraction: Share of the training rows that is held back when there is no validation split.
        max_length: Tokens after which a text is cut.
        head: `pooler` is transformers' own sequence classifier; `mean` averages the last hidden states.
        head_init: What the head starts from: `random` weights, or (with `mean`) the `class_means` of the training
            examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["text-classification"] = "text-classification"
    data: str | None = None
    subset: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    label_column: str | None = None
    shots: Annotated[int, Field(ge=1)] | None = None
    validation_fraction: Fraction = 0.1
    max_length: Annotated[int, Field(ge=2)] = 128
    head: Literal["pooler", "mean"] = "pooler"
    head_init: Literal["random", "class_means"] = "random"

    @field_validator("text_columns", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _means_need_the_mean(self) -> Self:
        if self.head_init == "class_means" and self.head != "mean":
            raise ValueError(f"head_init class_means needs head mean, but got head {self.head}")
        return self
