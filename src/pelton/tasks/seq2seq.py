"""Sequence to sequence: a target text for each source text, such as summaries (T5, BART)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import datasets
from pydantic import Field, model_validator
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.columns import pick_column
from pelton.tasks.positions import require_positions
from pelton.tasks.settings import Count, TaskSettings
from pelton.tasks.tables import Table
from pelton.tasks.texts import check_texts, require_texts

PAIRS = (
    ("source", "target"),
    ("input", "output"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("question", "answer"),
    ("input_text", "target_text"),
)
IGNORED = -100
LARGEST = 700.0
"""e to more than about 709 is more than a float holds."""


class Seq2SeqSettings(TaskSettings):
    """A target text for each source text.

    Attributes:
        source_column: The texts to read; found when not given, with its usual partner.
        target_column: The texts to write; likewise.
        prompt: What stands in front of every source, such as `summarize: `.
        max_source_length: Tokens that are kept of a source, with its prompt.
        max_target_length: Tokens that are kept of a target.
        generate: Whether evaluation writes texts, for `exact_match`; it takes many times as long as the loss alone.
        num_beams: Texts that generation follows at a time; 1 is greedy.
        max_new_tokens: Tokens that generation may write; `max_target_length` when not given.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    score: tuple[str, ...] = ("loss",)
    source_column: str | None = None
    target_column: str | None = None
    prompt: str = ""
    max_source_length: Annotated[int, Field(ge=2)] = 512
    max_target_length: Annotated[int, Field(ge=2)] = 128
    generate: bool = True
    num_beams: Count = 1
    max_new_tokens: Count | None = None

    @model_validator(mode="after")
    def _no_classes(self) -> Self:
        if self.shots is not None:
            raise ValueError("shots counts examples of each class, and texts have none: set examples instead")
        return self


@dataclass(frozen=True)
class TextPrediction:
    """What a model writes for one source."""

    source: str
    text: str


class Written(NamedTuple):
    """What is kept of one example: the text written, the summed loss of its target in nats, the target's tokens."""

    text: str
    loss: float
    tokens: int


class Batch(BatchEncoding):  # type: ignore[misc]
    """A batch with the tokenizer that reads what is written for it."""

    tokenizer: Any


@dataclass(frozen=True)
class SequenceToSequence(Task[Seq2SeqSettings]):
    """Source texts with one target text each."""

    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    new_head: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    @classmethod
    def plan(cls, settings: Seq2SeqSettings, table: Table) -> Self:
        """Finds the columns."""
        source, target = settings.source_column, settings.target_column
        known = [pair for pair in PAIRS if pair[0] == (source or pair[0]) and pair[1] == (target or pair[1])]
        pair = next((pair for pair in known if all(name in table.columns for name in pair)), (None, None))
        source = pick_column(table, source or pair[0], (), "task.source_column", "the source text")
        target = pick_column(table, target or pair[1], (), "task.target_column", "the target text")
        return cls(settings.model_copy(update={"source_column": source, "target_column": target}))

    @property
    def model_class(self) -> Any:
        """The encoder-decoder of transformers."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Checks that the backbone has positions enough; T5 has relative ones, as many as are wanted.

        Raises:
            DataError: a setting exceeds them.
        """
        for key in ("max_source_length", "max_target_length", "max_new_tokens"):
            require_positions(model, key, getattr(self.settings, key))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Share of texts written exactly as wanted, if any are written; loss in nats a target token; perplexity."""
        return (*(("exact_match",) if self.settings.generate else ()), "loss", "perplexity")

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, or a text is empty.
        """
        both = check_texts(table, (str(self.settings.source_column), str(self.settings.target_column)))
        return Examples([source for source, _ in both], [target for _, target in both])

    def check_inputs(self, table: Table) -> list[str]:
        """Reads sources alone, for prediction."""
        return [source for (source,) in check_texts(table, (str(self.settings.source_column),))]

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[str]:
        """Takes texts as sources."""
        if pairs is not None:
            raise DataError("Sequence to sequence reads one text an example: leave --pair out.")
        return require_texts(texts)

    def encode(self, inputs: Sequence[str], processor: Any, targets: Sequence[str] | None = None) -> Any:
        """Tokenises sources with their prompt, and targets."""
        settings, sources = self.settings, [self.settings.prompt + text for text in inputs]
        columns = dict(processor(sources, truncation=True, max_length=settings.max_source_length))
        if targets is not None:
            wanted = processor(text_target=list(targets), truncation=True, max_length=settings.max_target_length)
            columns["labels"] = wanted["input_ids"]
        return datasets.Dataset.from_dict(columns)

    def judged(self, examples: Examples, processor: Any) -> Any:
        """Returns features with targets, for their loss."""
        return self.encode(examples.inputs, processor, examples.targets)

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Counts the texts that are as long as they may be, and so were probably cut."""
        notes = []
        for column, what in (("input_ids", "source"), ("labels", "target")):
            key = f"max_{what}_length"
            full = sum(len(ids) >= getattr(self.settings, key) for ids in features[column])
            if full:
                notes.append(f"{full} of {len(examples)} {split} {what}s fill task.{key}; what is longer was cut")
        return tuple(notes)

    def collator(self, processor: Any) -> Collator:
        """Pads sources to the longest of a batch, and targets behind their end with what the loss ignores."""
        from transformers import DataCollatorForSeq2Seq

        pad = DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

        def collate(features: list[dict[str, Any]]) -> Batch:
            width = max(len(row.get("labels", ())) for row in features)
            if width:  # never in front, even where sources are: a decoder starts at the first token
                targets = [row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in features]
                features = [{**row, "labels": ids} for row, ids in zip(features, targets, strict=True)]
            batch = Batch({key: value for key, value in pad(features).items() if value is not None})
            if width:  # gates, too, leave padding alone
                batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
            batch.tokenizer = processor
            return batch

        return collate

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Returns the loss of the target, where there is one, and the text that is written, where it is wanted."""
        count = len(batch["input_ids"])
        losses, tokens, texts = [0.0] * count, [0] * count, [""] * count
        if "labels" in batch:
            labels = batch["labels"]
            logits = model(**batch, use_cache=False).logits.float()  # [B, T, vocabulary]
            losses = cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(dim=1).tolist()
            tokens = (labels != IGNORED).sum(dim=1).tolist()
        if "labels" not in batch or self.settings.generate:
            texts = self._write(model, batch)
        return [Written(*one) for one in zip(texts, losses, tokens, strict=True)]

    def _write(self, model: Any, batch: Any) -> list[str]:
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=self.settings.num_beams,
            max_new_tokens=self.settings.max_new_tokens or self.settings.max_target_length,
            do_sample=False,
        )
        return [text.strip() for text in batch.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Written]) -> dict[str, float]:
        """Computes the metrics of `metrics`; the loss is over all target tokens, each counts the same."""
        loss = math.fsum(one.loss for one in outputs) / sum(one.tokens for one in outputs)
        values = {"loss": loss, "perplexity": math.exp(loss) if loss < LARGEST else math.inf}
        if not self.settings.generate:
            return values
        same = [one.text == target.strip() for one, target in zip(outputs, examples.targets, strict=True)]
        return {"exact_match": sum(same) / len(same), **values}

    def predict(self, inputs: Sequence[str], features: Any, outputs: Sequence[Written]) -> list[TextPrediction]:
        """Returns what the model writes for each source."""
        return [TextPrediction(source, one.text) for source, one in zip(inputs, outputs, strict=True)]
