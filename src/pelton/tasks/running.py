"""Language modelling of running text: text files, cut into blocks; a new backbone's tokenizer is learned here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import datasets
from pydantic import Field, model_validator

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.blocks import features, stream, to_judge, to_learn
from pelton.tasks.decoding import Answer, Judged, Prompts, answer, collate, judge
from pelton.tasks.positions import require_positions
from pelton.tasks.settings import Count, TaskSettings
from pelton.tasks.tables import Table
from pelton.tasks.texts import check_texts, require_texts
from pelton.tasks.vocabulary import UNKNOWN, Kind, learn_tokenizer, require_same

TEXT = "text"


class RunningTextSettings(TaskSettings):
    """A text, and how much of it a model sees at once.

    Attributes:
        text_column: The texts of files that are tables; a .txt file is one text.
        tokenizer: What a new backbone's tokenizer is, learned from the training text: `char` or `bpe`. A pretrained
            backbone has its own.
        vocab_size: Tokens of a learned tokenizer; when not given, all characters, or 2048 for `bpe`.
        block_size: Tokens that the model sees at once.
        stride: Tokens from the beginning of one training block to that of the next. When not given, blocks follow each
            other, and every token is learned once an epoch.
        eval_stride: Tokens that a block judges, of which the others are context. When not given, all that it can.
        max_new_tokens: Tokens of a continuation; its prompt has `block_size` less these, and loses its beginning where
            it is longer.
        temperature: Of the draws of a continuation, which are the same every time; 0 takes the likeliest token.
    """

    kind: Literal["text-lm"] = "text-lm"
    score: tuple[str, ...] = ("loss",)
    text_column: str = TEXT
    tokenizer: Kind | None = None
    vocab_size: Count | None = None
    block_size: Annotated[int, Field(ge=2)] = 256
    stride: Count | None = None
    eval_stride: Count | None = None
    max_new_tokens: Count = 128
    temperature: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _inside_a_block(self) -> Self:
        for name in ("stride", "eval_stride", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value >= self.block_size:
                raise ValueError(f"{name} < block_size must hold, but got {value} and {self.block_size}")
        if self.shots is not None:
            raise ValueError("shots counts examples a class, and a language model has no classes")
        if self.vocab_size is not None and self.tokenizer is None:
            raise ValueError("vocab_size is for a learned tokenizer: set tokenizer to char or bpe")
        return self


@dataclass(frozen=True)
class Continuation:
    """How a model goes on with a text.

    Attributes:
        prompt: The beginning.
        completion: What follows.
        finished: Whether it comes to an end of text, rather than to `max_new_tokens`.
        cut: Tokens of the prompt's beginning that were cut off.
        unknown: Characters of the prompt that the tokenizer does not know, which the model reads as one unknown token.
    """

    prompt: str
    completion: str
    finished: bool
    cut: int
    unknown: int


@dataclass(frozen=True)
class RunningText(Task[RunningTextSettings]):
    """Texts to model token by token."""

    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    new_head: ClassVar[bool] = False
    loss_counts_tokens: ClassVar[bool] = True

    @classmethod
    def plan(cls, settings: RunningTextSettings, table: Table) -> Self:
        """Takes the settings as they are; the column is looked up with the rows."""
        return cls(settings)

    @property
    def model_class(self) -> Any:
        """The language model of transformers."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def load_processor(self, load: Callable[[Any], Any]) -> Any:
        """Loads the backbone's tokenizer.

        Raises:
            DataError: it has no end of text, or is not the one that the settings ask for.
        """
        tokenizer = super().load_processor(load)
        if tokenizer.eos_token_id is None:
            raise DataError("The backbone's tokenizer has no end-of-text token (eos_token), which begins a text.")
        require_same(tokenizer, self.settings.tokenizer)
        return tokenizer

    def make_processor(self, config: Any, examples: Examples) -> Any:
        """Learns a tokenizer from the training text; of characters, unless the settings ask for pairs."""
        return learn_tokenizer(examples.inputs, self.settings.tokenizer or "char", self.settings.vocab_size)

    def config_options(self, processor: Any) -> dict[str, Any]:
        """Returns the size of the vocabulary, and the tokens at its beginning, its end and in its padding."""
        tokens = {name: getattr(processor, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {"vocab_size": len(processor), **tokens}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Nats a token, their exponential, the share of tokens that are likeliest, nats and bits a character.

        `unknown` is the share of tokens that stand for a character which the tokenizer does not know: the loss of these
        says only how well it is foreseen that something unknown comes.
        """
        return ("loss", "perplexity", "token_accuracy", "loss_per_char", "bits_per_char", "unknown")

    def check(self, table: Table) -> Examples:
        """Turns a table into texts, each a target as well.

        Raises:
            DataError: the column is missing, or a text is empty.
        """
        texts = self.check_inputs(table)
        return Examples(texts, list(texts))

    def check_inputs(self, table: Table) -> list[str]:
        """Reads texts to go on with."""
        table.column(self.settings.text_column)
        return [text for (text,) in check_texts(table, (self.settings.text_column,))]

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[str]:
        """Takes texts to go on with as they were typed."""
        if pairs is not None:
            raise DataError("This task goes on with one text, without a second: leave --pair out.")
        return require_texts(texts)

    def require_splits(self, splits: Mapping[str, Examples]) -> None:
        """Raises DataError where validation rows were to be held back of a text that is one row."""
        wanted = self.settings.validation_fraction, self.settings.validation_examples
        if "validation" not in splits and (wanted[0] if wanted[1] is None else wanted[1]):
            raise DataError(
                f"No part of {len(splits['train'])} training text(s) can be held back for validation: texts are kept "
                "whole. Put a part into a file validation.txt beside the training file, name one with "
                "task.validation, or do without: task.validation_fraction=0."
            )

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Checks that a block fits the backbone, and that the training text has one."""
        more = ", or raise backbone_config.max_position_embeddings of a new backbone"
        require_positions(model, "block_size", self.settings.block_size, more)
        next(iter(batches()))

    @property
    def packs(self) -> bool:
        """Texts share blocks."""
        return True

    def encode(self, inputs: Sequence[str], processor: Any, targets: Sequence[str] | None = None) -> Any:
        """Tokenises beginnings to go on with or, with targets, cuts texts into blocks to learn.

        Raises:
            DataError: all texts together are shorter than a block.
        """
        settings = self.settings
        if targets is None:
            return self._prompts(inputs, processor)
        tokens, size = stream(targets, processor), settings.block_size
        if len(tokens) < size:
            raise DataError(
                f"The training text has {len(tokens)} tokens, which is less than one block of task.block_size={size}. "
                "Lower it, or add text."
            )
        blocks = to_learn(tokens, size, settings.stride or size - 1)
        return features(tokens, blocks, processor.unk_token_id)

    def judged(self, examples: Examples, processor: Any) -> Any:
        """Cuts texts into blocks that judge every token once."""
        tokens, size = stream(examples.targets, processor), self.settings.block_size
        return features(tokens, to_judge(tokens, size, self.settings.eval_stride or size - 1), processor.unk_token_id)

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Says how many characters the tokenizer does not know; of judged texts a metric does."""
        if split != "training":
            return ()
        unknown = sum(count for counts in features["unknown"] for count in counts)
        total = sum(len(ids) - 1 for ids in features["input_ids"])
        if not unknown:
            return ()
        return (
            f"{unknown} of {total} tokens to learn ({unknown / total:.2%}) stand for characters that the tokenizer "
            f"does not know: the model reads and learns each as {UNKNOWN}",
        )

    def collator(self, processor: Any) -> Collator:
        """Pads blocks on the right and prompts on the left."""
        return partial(collate, tokenizer=processor)

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Judges blocks, or goes on with prompts."""
        if isinstance(batch, Prompts):
            return answer(model, batch, self.settings.max_new_tokens, self.settings.temperature)
        return judge(model, batch)

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Judged]) -> dict[str, float]:
        """Computes the metrics of `metrics` over all tokens of the texts."""
        tokens, characters = sum(one.tokens for one in outputs), sum(len(text) for text in examples.inputs)
        nats = math.fsum(one.nll for one in outputs)
        return {
            "loss": nats / tokens,
            "perplexity": math.exp(nats / tokens) if nats / tokens < 700 else math.inf,  # e^710 is beyond a float
            "token_accuracy": sum(one.right for one in outputs) / tokens,
            "loss_per_char": nats / characters,
            "bits_per_char": nats / characters / math.log(2),
            "unknown": sum(count for counts in features["unknown"] for count in counts) / tokens,
        }

    def predict(self, inputs: Sequence[str], features: Any, outputs: Sequence[Answer]) -> list[Continuation]:
        """Returns how the model goes on with each beginning."""
        rows = zip(inputs, outputs, features["cut"], features["unknown"], strict=True)
        return [Continuation(text, said.text, said.finished, cut, unknown) for text, said, cut, unknown in rows]

    def _prompts(self, texts: Sequence[str], tokenizer: Any) -> Any:
        room = self.settings.block_size - self.settings.max_new_tokens
        prompts = [stream([text], tokenizer) for text in texts]
        unknown = [0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id) for ids in prompts]
        cut = [max(len(ids) - room, 0) for ids in prompts]
        return datasets.Dataset.from_dict(
            {"input_ids": [ids[-room:] for ids in prompts], "cut": cut, "unknown": unknown}
        )
