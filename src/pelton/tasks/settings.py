"""What a recipe says about any task; each kind adds its own in its file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class TaskSettings(BaseModel):
    """Where the rows are, and how many of them are used.

    Attributes:
        kind: The kind of task.
        data: A folder with one file per split, a file of training rows, a name on the hub, or `pelton:banking77`.
        subset: The configuration of a hub data set, such as `mrpc` of `nyu-mll/glue`.
        train: The split, or file, with the training rows; found by its usual names when not given.
        validation: Likewise; rows are held back from training when there is none, or when this is `train`.
        test: Likewise; never used for training or selection.
        shots: Training examples kept for each class; all when not given.
        examples: Training examples kept in all, in the proportions of the classes; all when not given.
        validation_fraction: Share of the training rows that is held back when there is no validation split.
        validation_examples: Number of validation rows, instead of a fraction.
        streaming: Reads the training rows while training lasts, and never holds them all in memory; other splits are
            read whole. Needs `training.max_steps`, and classes that are known without reading all rows.
        shuffle_buffer: Encoded rows among which a streamed row is drawn at random.
        memory_map: Writes the encoded training rows to a file in the run's folder and reads them from there.
        score: The metrics whose mean chooses the checkpoint and compares runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    data: str | None = None
    subset: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    shots: Count | None = None
    examples: Count | None = None
    validation_fraction: Fraction = 0.1
    validation_examples: Annotated[int, Field(ge=0)] | None = None
    streaming: bool = False
    shuffle_buffer: Count = 10_000
    memory_map: bool = False
    score: Annotated[tuple[str, ...], Field(min_length=1)]

    @field_validator("score", mode="before")
    @classmethod
    def _one_score(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> Self:
        if self.shots is not None and self.examples is not None:
            raise ValueError("shots (a class) and examples (in all) exclude each other")
        return self

    @model_validator(mode="after")
    def _streamed_rows_are_not_held(self) -> Self:
        for name in ("shots", "examples", "memory_map"):
            if self.streaming and getattr(self, name):
                raise ValueError(f"streaming never holds all rows, which {name} needs: set one of the two")
        return self


class TextSettings(TaskSettings):
    """Tasks over one text or a pair of texts.

    Attributes:
        text_columns: One column, or two for pairs; found when not given.
        label_column: The column of the label; found when not given.
        max_length: Tokens that are kept of a text or pair; as many as the backbone has positions for when these are
            fewer and it is not given.
        keep: Which end of a text is kept when it is too long: its `head` or its `tail`.
        shorten: Which text of a pair is cut: the `longest` at each token, the `first` or the `second`; both, where the
            other one alone leaves no room.
    """

    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    label_column: str | None = None
    max_length: Annotated[int, Field(ge=2)] = 128
    keep: Literal["head", "tail"] = "head"
    shorten: Literal["longest", "first", "second"] = "longest"

    @field_validator("text_columns", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
