"""Token classification: one tag a word, such as named entities in BIO tags."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import datasets
import numpy as np
from pydantic import Field

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.columns import pick_column
from pelton.tasks.labels import Labels
from pelton.tasks.metrics import cross_entropy, tag_metrics
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table
from pelton.tasks.tags import OUTSIDE, check_tags, find_tags
from pelton.tasks.texts import require_texts

WORDS = ("tokens", "words", "text")
TAGS = ("ner_tags", "tags", "labels", "pos_tags")
IGNORED = -100
CUT = -1


class TokenSettings(TaskSettings):
    """One tag for each word of a sentence.

    Attributes:
        word_column: Lists of words; found when not given.
        tag_column: Lists of tags, as many as words; found when not given.
        max_length: Subwords that are kept of a sentence, words behind are predicted as outside; as many as the backbone
            has positions for when these are fewer and it is not given.
        bio: What happens to an entity that starts with I-: `strict` refuses it, `repair` reads it as B-.
    """

    kind: Literal["token-classification"] = "token-classification"
    score: tuple[str, ...] = ("f1",)
    word_column: str | None = None
    tag_column: str | None = None
    max_length: Annotated[int, Field(ge=3)] = 128
    bio: Literal["strict", "repair"] = "strict"


@dataclass(frozen=True)
class TagPrediction:
    """What a model says about one sentence: a tag for each word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class TokenClassification(Task[TokenSettings]):
    """Words with one tag each; a word's tag is read at its first subword."""

    labels: Labels

    peft_type: ClassVar[str | None] = "TOKEN_CLS"

    @classmethod
    def plan(cls, settings: TokenSettings, table: Table) -> Self:
        """Finds the columns, and the tags of the training rows."""
        words = pick_column(table, settings.word_column, WORDS, "task.word_column", "the words")
        tags = pick_column(table, settings.tag_column, TAGS, "task.tag_column", "the tags")
        settings = settings.model_copy(update={"word_column": words, "tag_column": tags})
        return cls(settings, find_tags(table, tags))

    @classmethod
    def restore(cls, settings: TokenSettings, stored: Mapping[str, Any]) -> Self:
        """Rebuilds the task with a run's tags."""
        return cls(settings, Labels.restored(stored))

    def stored(self) -> dict[str, Any]:
        """Returns the tags."""
        return self.labels.stored()

    @property
    def model_class(self) -> Any:
        """The token classifier of transformers."""
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def model_options(self) -> dict[str, Any]:
        """Returns the tags."""
        return self.labels.model_options()

    def load_processor(self, load: Any) -> Any:
        """Loads a fast tokenizer that reads words one by one."""
        from transformers import AutoTokenizer

        tokenizer = load(AutoTokenizer)
        if not tokenizer.is_fast:
            raise DataError("Token classification needs a fast tokenizer, which knows the word of each subword.")
        if getattr(tokenizer, "add_prefix_space", None) is False:  # RoBERTa, GPT-2: a word alone has no space in front
            tokenizer = load(AutoTokenizer, add_prefix_space=True)
        return tokenizer

    @property
    def metrics(self) -> tuple[str, ...]:
        """Entity-level scores of BIO tags (macro F1 of other tags), accuracy of words, and loss."""
        return (*(("f1", "precision", "recall") if self.labels.bio else ("macro_f1",)), "accuracy", "loss")

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, words and tags differ in number, a word is no text, a tag is unseen, or an
                entity starts with I- under `bio: strict`.
        """
        words = self.check_inputs(table)
        tags, notes = check_tags(
            table, str(self.settings.tag_column), words, self.labels, self.settings.bio == "repair"
        )
        return Examples(words, tags, notes)

    def check_inputs(self, table: Table) -> list[tuple[str, ...]]:
        """Reads words alone, for prediction; a text is cut at its spaces."""
        column = str(self.settings.word_column)
        if not len(table):
            raise DataError(f"{table.name} is empty: expected at least one row.")
        found = []
        for row, cell in enumerate(table.column(column)):
            words = cell.split() if isinstance(cell, str) else cell
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise DataError(f"{table.where(row, column)}: expected a list of one or more words, but got {cell!r}.")
            found.append(tuple(words))
        return found

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[tuple[str, ...]]:
        """Cuts texts at their spaces."""
        if pairs is not None:
            raise DataError("Token classification reads one text an example: leave --pair out.")
        return [tuple(text.split()) for text in require_texts(texts)]

    def strata(self, examples: Examples) -> list[Hashable]:
        """Returns whether a sentence has more than one kind of tag: entities are rare."""
        return [len(set(tags)) > 1 for tags in examples.targets]

    def classes(self, examples: Examples) -> tuple[str, set[Any]]:
        """Returns the tag column and the tags that occur."""
        return str(self.settings.tag_column), {tag for tags in examples.targets for tag in tags}

    def encode(
        self, inputs: Sequence[tuple[str, ...]], processor: Any, targets: Sequence[Sequence[int]] | None = None
    ) -> Any:
        """Tokenises words; `starts` holds the place of each word's first subword, -1 where it was cut off."""
        encoded = processor(
            [list(words) for words in inputs],
            is_split_into_words=True,
            truncation=True,
            max_length=self.settings.max_length,
        )
        starts = [_starts(encoded.word_ids(row), len(words)) for row, words in enumerate(inputs)]
        columns = {**encoded, "starts": starts}
        if targets is not None:
            sizes = [len(ids) for ids in encoded["input_ids"]]
            columns["labels"] = [
                _place(tags, places, size) for tags, places, size in zip(targets, starts, sizes, strict=True)
            ]
        return datasets.Dataset.from_dict(columns)

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Counts the words that were cut off, and the sentences they are of."""
        cut = [list(places).count(CUT) for places in features["starts"]]
        sentences, words = sum(count > 0 for count in cut), sum(cut)
        note = f"{words} words of {sentences} {split} sentences are behind task.max_length, or have no subword, and "
        return (f"{note}are {'not learned from' if split == 'training' else 'predicted outside'}",) if words else ()

    def collator(self, processor: Any) -> Collator:
        """Pads subwords, and tags with what the loss ignores."""
        from transformers import DataCollatorForTokenClassification

        pad = DataCollatorForTokenClassification(processor, label_pad_token_id=IGNORED)

        def collate(features: list[dict[str, Any]]) -> Any:
            return pad([{key: value for key, value in row.items() if key != "starts"} for row in features])

        return collate

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Returns logits [subwords, tags] for each row, without padding."""
        logits = model(**batch).logits.float()
        return [row[mask.bool()].cpu().numpy() for row, mask in zip(logits, batch["attention_mask"], strict=True)]

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of `metrics`; a word that was cut off counts as predicted outside."""
        predicted = self._tags(features, outputs)
        names = self.labels.names
        true = [[names[tag] for tag in tags] for tags in examples.targets]
        kept = [
            (logits[place], tag)
            for logits, places, tags in zip(outputs, features["starts"], examples.targets, strict=True)
            for place, tag in zip(places, tags, strict=True)
            if place != CUT
        ]
        loss = cross_entropy(np.stack([row for row, _ in kept]), np.asarray([tag for _, tag in kept]))
        return {**tag_metrics(true, predicted, entities=self.labels.bio), "loss": loss}

    def predict(self, inputs: Sequence[tuple[str, ...]], features: Any, outputs: Sequence[Any]) -> list[TagPrediction]:
        """Returns a tag for each word."""
        tags = self._tags(features, outputs)
        return [TagPrediction(tuple(words), tuple(found)) for words, found in zip(inputs, tags, strict=True)]

    def _tags(self, features: Any, outputs: Sequence[Any]) -> list[list[str]]:
        names = self.labels.names
        outside = OUTSIDE if OUTSIDE in names else names[0]
        return [
            [outside if place == CUT else names[int(logits[place].argmax())] for place in places]
            for logits, places in zip(outputs, features["starts"], strict=True)
        ]


def _starts(word_ids: Sequence[int | None], count: int) -> list[int]:
    """Returns the place of each word's first subword; a word that was cut off, or has no subword, has none."""
    starts = [CUT] * count
    for place, word in enumerate(word_ids):
        if word is not None and starts[word] == CUT:
            starts[word] = place
    return starts


def _place(tags: Sequence[int], starts: Sequence[int], size: int) -> list[int]:
    """Puts tags at first subwords; all else is ignored by the loss."""
    placed = [IGNORED] * size
    for tag, start in zip(tags, starts, strict=True):
        if start != CUT:
            placed[start] = tag
    return placed
