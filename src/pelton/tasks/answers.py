"""Extractive question answering: the part of a context that answers a question, in the format of SQuAD."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.columns import pick_column
from pelton.tasks.metrics import softmax
from pelton.tasks.positions import require_positions
from pelton.tasks.questions import Gold, Question, read_answers, read_questions
from pelton.tasks.settings import TaskSettings
from pelton.tasks.spans import Window, best_spans, null_score
from pelton.tasks.squad import squad_metrics
from pelton.tasks.tables import Table
from pelton.tasks.texts import require_texts
from pelton.tasks.windows import OWN, Cut, encode_windows, require_room

QUESTIONS = ("question", "query")
CONTEXTS = ("context", "passage", "paragraph", "document")
ANSWERS = ("answers", "answer")
POSITIONS = ("start_positions", "end_positions")


class AnswerSettings(TaskSettings):
    """A part of a text that answers a question.

    Attributes:
        question_column: The questions; found when not given.
        context_column: The texts that hold the answers; found when not given.
        answer_column: The right answers, as SQuAD has them; found when not given.
        max_length: Tokens of a window of the context, with the question.
        max_question_length: Tokens that are kept of a question.
        doc_stride: Tokens that two neighbouring windows of a context have in common.
        max_answer_length: Tokens that a predicted answer may have.
        n_best: Spans of a question among which its probability is shared out.
        unanswerable: Whether a question may have no answer (SQuAD 2.0); found in the training rows when not given.
        null_threshold: By how much the score of no answer must exceed that of the best span to be the prediction.
    """

    kind: Literal["question-answering"] = "question-answering"
    score: tuple[str, ...] = ("f1",)
    question_column: str | None = None
    context_column: str | None = None
    answer_column: str | None = None
    max_length: Annotated[int, Field(ge=8)] = 384
    max_question_length: Annotated[int, Field(ge=1)] = 64
    doc_stride: Annotated[int, Field(ge=0)] = 128
    max_answer_length: Annotated[int, Field(ge=1)] = 30
    n_best: Annotated[int, Field(ge=1)] = 20
    unanswerable: bool | None = None
    null_threshold: float = 0.0

    @property
    def cut(self) -> Cut:
        """How contexts are cut into windows."""
        return Cut(self.max_length, self.max_question_length, self.doc_stride)


@dataclass(frozen=True)
class AnswerPrediction:
    """What a model says about one question.

    Attributes:
        id: What the data call the question.
        question: The question.
        answer: A part of the context; empty where the question has no answer.
        start: The character of the context at which the answer starts; None without an answer.
        end: The character behind it.
        score: The sum of the logits of the answer's first and last token.
        probability: The answer's share among the `n_best` spans (and no answer, where that is possible).
        no_answer: Score of no answer minus score of the best span; None where every question has an answer.
    """

    id: str
    question: str
    answer: str
    start: int | None
    end: int | None
    score: float
    probability: float
    no_answer: float | None


@dataclass(frozen=True)
class QuestionAnswering(Task[AnswerSettings]):
    """Questions, each with a context that is cut into windows: a feature is a window."""

    # PEFT's QUESTION_ANS wrapper does not pass token_type_ids on: BERT could not tell question from context.
    peft_type: ClassVar[str | None] = None
    streams: ClassVar[bool] = True

    @classmethod
    def plan(cls, settings: AnswerSettings, table: Table) -> Self:
        """Finds the columns, and whether every training question has an answer."""
        question = pick_column(table, settings.question_column, QUESTIONS, "task.question_column", "the question")
        context = pick_column(table, settings.context_column, CONTEXTS, "task.context_column", "the context")
        answer = pick_column(table, settings.answer_column, ANSWERS, "task.answer_column", "the right answers")
        found: dict[str, Any] = {"question_column": question, "context_column": context, "answer_column": answer}
        if settings.unanswerable is None:
            golds = read_answers(table, answer, read_questions(table, question, context))
            found["unanswerable"] = not all(gold.texts for gold in golds)
        return cls(settings.model_copy(update=found))

    @property
    def model_class(self) -> Any:
        """The span predictor of transformers."""
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def model_options(self) -> dict[str, Any]:
        """Asks for two outputs a token: start and end."""
        return {"num_labels": 2}

    def load_processor(self, load: Any) -> Any:
        """Loads the backbone's tokenizer, and checks that it can make the windows."""
        tokenizer = super().load_processor(load)
        require_room(tokenizer, self.settings.cut)
        return tokenizer

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Checks that the backbone has a head of its own, and positions enough for a window.

        Raises:
            DataError: it has not.
        """
        if model.base_model is model:  # T5: its encoder and decoder would be trained in full, as part of the head
            raise DataError(
                f"{type(model).__name__} does not keep its head apart from what is pretrained. Take a backbone such as "
                "BERT, RoBERTa, DeBERTa or BART, or learn to write the answers with task.kind=seq2seq."
            )
        require_positions(model, "max_length", self.settings.max_length)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The official ones; where a question may have no answer also those of either kind of question."""
        kinds = ("answered_exact_match", "answered_f1", "unanswered_exact_match")
        return ("exact_match", "f1", *(kinds if self.settings.unanswerable else ()))

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, a text is empty, an answer is not where it is said to be, or there is none
                and `unanswerable` is off.
        """
        questions, column = self.check_inputs(table), str(self.settings.answer_column)
        golds = read_answers(table, column, questions)
        for row, gold in enumerate(golds):
            if not gold.texts and not self.settings.unanswerable:
                raise DataError(
                    f"{table.where(row, column)}: the question has no answer, but every training question has one (or "
                    "task.unanswerable is false). Set task.unanswerable=true or remove the row."
                )
        return Examples(questions, golds)

    def check_inputs(self, table: Table) -> list[Question]:
        """Reads questions and contexts alone, for prediction."""
        return read_questions(table, str(self.settings.question_column), str(self.settings.context_column))

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Question]:
        """Takes a text as the question and its pair as the context."""
        if pairs is None:
            raise DataError("A question needs a context to be answered from: give one --pair for each --text.")
        both = zip(require_texts(texts), require_texts(pairs), strict=True)
        return [Question(*one, str(row)) for row, one in enumerate(both, 1)]

    def strata(self, examples: Examples) -> list[Hashable]:
        """Returns whether a question has an answer."""
        return [bool(gold.texts) for gold in examples.targets]

    def encode(self, inputs: Sequence[Any], processor: Any, targets: Sequence[Gold] | None = None) -> Any:
        """Cuts contexts into windows; see `encode_windows` for the columns."""
        return encode_windows([Question(*one) for one in inputs], targets, processor, self.settings.cut)

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Counts the questions that were cut and, of training ones, those whose answer is whole in no window."""
        asked = len({row for row, cut in zip(features["example"], features["asked"], strict=True) if cut})
        limit = f"task.max_question_length {self.settings.max_question_length}"
        cut = (f"{asked} of {len(examples)} {split} questions are longer than {limit} and were cut",) if asked else ()
        return (*cut, *self._unheld(examples, features)) if split == "training" else cut

    def _unheld(self, examples: Examples, features: Any) -> tuple[str, ...]:
        starts, ends, null = (np.asarray(features[name]) for name in (*POSITIONS, "null"))
        held = set(np.asarray(features["example"])[(starts != null) | (ends != null)].tolist())
        lost = sum(bool(gold.texts) and row not in held for row, gold in enumerate(examples.targets))
        note = f"{lost} of {len(examples)} training questions have an answer that is whole in no window; they are "
        return (f"{note}learned as unanswerable. Raise task.doc_stride or task.max_length.",) if lost else ()

    def unmeasurable(self, examples: Examples) -> tuple[str, ...]:
        """Names the metrics of questions of a kind, with or without an answer, that does not occur."""
        found = {"answered" if gold.texts else "unanswered" for gold in examples.targets}
        return tuple(name for name in self.metrics if name.partition("_")[0] in {"answered", "unanswered"} - found)

    def collator(self, processor: Any) -> Collator:
        """Pads to the longest window of a batch; where padding stands in front, positions move with the tokens."""
        from transformers import DataCollatorWithPadding

        pad = DataCollatorWithPadding(processor)

        def collate(features: list[dict[str, Any]]) -> Any:
            batch = pad([{key: value for key, value in row.items() if key not in OWN} for row in features])
            for name in POSITIONS:
                if name in batch:
                    batch[name] = batch[name] + batch["attention_mask"].argmax(dim=-1)
            return batch

        return collate

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Returns logits [tokens, 2] of starts and ends for each window, without padding."""
        found = model(**batch)
        logits = np.stack([found.start_logits.float().cpu().numpy(), found.end_logits.float().cpu().numpy()], axis=-1)
        return [row[mask] for row, mask in zip(logits, batch["attention_mask"].bool().cpu().numpy(), strict=True)]

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of `metrics`."""
        answers = [one.answer for one in self.predict(examples.inputs, features, outputs)]
        return squad_metrics(answers, [gold.texts for gold in examples.targets], bool(self.settings.unanswerable))

    def predict(self, inputs: Sequence[Any], features: Any, outputs: Sequence[Any]) -> list[AnswerPrediction]:
        """Returns the best span over the windows of each question, or none."""
        columns = [features[name] for name in ("begins", "ends", "null")]
        windows = [
            Window(logits, np.asarray(begins), np.asarray(ends), null)
            for logits, begins, ends, null in zip(outputs, *columns, strict=True)
        ]
        # the windows of a question are neighbours
        bounds = np.searchsorted(np.asarray(features["example"]), np.arange(len(inputs) + 1)).tolist()
        return [
            self._answer(Question(*one), windows[first:last])
            for one, (first, last) in zip(inputs, pairwise(bounds), strict=True)
        ]

    def _answer(self, one: Question, windows: Sequence[Window]) -> AnswerPrediction:
        spans = best_spans(one.context, windows, self.settings.n_best, self.settings.max_answer_length)
        null = null_score(windows)
        scores = [*(span.score for span in spans), *([null] if self.settings.unanswerable or not spans else [])]
        shares = softmax(np.array(scores)).tolist()
        margin = null - spans[0].score if self.settings.unanswerable and spans else None
        if not spans or (margin is not None and margin > self.settings.null_threshold):
            return AnswerPrediction(one.id, one.question, "", None, None, null, shares[-1], margin)
        start, end, score = spans[0]
        return AnswerPrediction(one.id, one.question, one.context[start:end], start, end, score, shares[0], margin)
