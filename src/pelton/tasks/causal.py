"""Causal language modelling: responses to prompts (instruction tuning), replies in conversations, or plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import datasets
from pydantic import Field, field_validator, model_validator

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.completions import Completion, Limits, as_dataset, ask, columns, complete
from pelton.tasks.conversations import Fields, Prompt, find_fields, read_examples, read_prompts
from pelton.tasks.decoding import Answer, Judged, Prompts, answer, collate, judge
from pelton.tasks.packing import pack, require_packable
from pelton.tasks.settings import Count, TaskSettings
from pelton.tasks.tables import Table
from pelton.tasks.templates import ALPACA, ALPACA_INPUT, PLAIN, Chat, Continued, Formatted, Template, split_format

END = {"head": "end", "tail": "beginning"}
"""What a response loses where an end of it is kept."""


class CausalSettings(TaskSettings):
    r"""What a language model is to say: responses, replies or texts.

    Attributes:
        prompt_column: The prompts; found when not given, as are the others.
        response_column: The responses.
        input_column: What an instruction is about, where rows have it; may be empty.
        messages_column: Conversations, lists of `{role, content}` whose last is the assistant's, instead of the above.
        text_column: Plain texts, all of which is learned, instead of the above.
        template: `plain` writes `format`; `chat` uses the tokenizer's chat template. Chat for conversations and plain
            for all else, when not given.
        format: How `plain` writes a prompt and its response. When not given, `{prompt}\n{response}`, or Alpaca's where
            there is an input column.
        format_with_input: The same for rows that have an input.
        loss_on: The `response` alone (of a conversation its last reply), or `all` tokens.
        max_length: Tokens that are kept of a prompt and its response, the end of text among them.
        keep: Which end of a longer one is kept: its `head`, or its `tail` with the response.
        packing: Puts several examples into one training sequence of `max_length`, none of which sees another.
        max_new_tokens: Tokens that a prediction may have; its prompt has `max_length` less these, and loses its
            beginning where it is longer.
    """

    kind: Literal["causal-lm"] = "causal-lm"
    score: tuple[str, ...] = ("loss",)
    prompt_column: str | None = None
    response_column: str | None = None
    input_column: str | None = None
    messages_column: str | None = None
    text_column: str | None = None
    template: Literal["chat", "plain"] | None = None
    format: str | None = None
    format_with_input: str | None = None
    loss_on: Literal["response", "all"] = "response"
    max_length: Annotated[int, Field(ge=2)] = 512
    keep: Literal["head", "tail"] = "head"
    packing: bool = False
    max_new_tokens: Count = 128

    @field_validator("format", "format_with_input")
    @classmethod
    def _known_fields(cls, value: str | None) -> str | None:
        if value is not None:
            split_format(value)
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(self.fields.forms) > 1:
            raise ValueError("columns of prompt and response, messages_column and text_column exclude each other")
        if self.shots is not None:
            raise ValueError("shots counts examples a class, and a language model has no classes: set examples instead")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens < max_length must hold, but got {self.max_new_tokens} and {self.max_length}"
            )
        return self

    @property
    def fields(self) -> Fields:
        """The columns."""
        return Fields(
            self.prompt_column, self.response_column, self.input_column, self.messages_column, self.text_column
        )

    def resolve(self, fields: Fields) -> Self:
        """Returns settings with the columns that were found, the template and its formats.

        Raises:
            DataError: the template does not go with the columns.
        """
        if fields.messages is not None and self.template == "plain":
            raise DataError(f"Conversations ({fields.messages!r}) need a chat template: set task.template=chat.")
        if fields.text is not None and self.template == "chat":
            raise DataError(f"Plain texts ({fields.text!r}) take no chat template: leave task.template out.")
        formats = (PLAIN, ALPACA_INPUT) if fields.context is None else (ALPACA, ALPACA_INPUT)
        return self.model_copy(
            update={
                "prompt_column": fields.prompt,
                "response_column": fields.response,
                "input_column": fields.context,
                "messages_column": fields.messages,
                "text_column": fields.text,
                "template": "plain" if fields.messages is None and self.template is None else self.template or "chat",
                "format": self.format or formats[0],
                "format_with_input": self.format_with_input or self.format or formats[1],
            }
        )


@dataclass(frozen=True)
class Generation:
    """What a model says to one prompt.

    Attributes:
        prompt: The prompt, as messages where it is a conversation.
        completion: The text that is likeliest token by token.
        finished: Whether it ends by itself, rather than at `max_new_tokens`.
        cut: Tokens of the prompt's beginning that were cut off.
    """

    prompt: str | list[dict[str, str]]
    completion: str
    finished: bool
    cut: int


@dataclass(frozen=True)
class CausalLM(Task[CausalSettings]):
    """Prompts with one response each."""

    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    new_head: ClassVar[bool] = False
    loss_counts_tokens: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    @classmethod
    def plan(cls, settings: CausalSettings, table: Table) -> Self:
        """Finds the columns."""
        return cls(settings.resolve(find_fields(table, settings.fields)))

    @property
    def model_class(self) -> Any:
        """The language model of transformers."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def load_processor(self, load: Callable[[Any], Any]) -> Any:
        """Loads the tokenizer.

        Raises:
            DataError: it has no end of text, or no chat template where one is asked for.
        """
        tokenizer = super().load_processor(load)
        if tokenizer.eos_token_id is None:
            raise DataError("The backbone's tokenizer has no end-of-text token (eos_token), with which responses end.")
        if self.settings.template == "chat" and tokenizer.chat_template is None:
            raise DataError(
                "The backbone's tokenizer has no chat template. Take the instruction-tuned variant of the backbone, "
                "or for prompts and responses set task.template=plain."
            )
        return tokenizer

    @property
    def metrics(self) -> tuple[str, ...]:
        """Loss in nats a token, its exponential, and the share of tokens that are the likeliest; all over the set."""
        return ("loss", "perplexity", "token_accuracy")

    @property
    def template(self) -> Template:
        """What writes prompts and responses."""
        if self.settings.text_column is not None:
            return Continued()
        if self.settings.template == "chat":
            return Chat()
        return Formatted(str(self.settings.format), str(self.settings.format_with_input))

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, a text is empty, or a conversation is broken.
        """
        return Examples(*read_examples(table, self.settings.fields))

    def check_inputs(self, table: Table) -> list[Prompt]:
        """Reads prompts alone, for prediction."""
        return read_prompts(table, self.settings.fields)

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Prompt]:
        """Makes prompts of texts, and of their inputs where the task has such; to a chat each is the user's."""
        if pairs is not None and self.settings.input_column is None:
            raise DataError("This task's prompts are one text, without an input: leave --pair out.")
        return [Prompt(text, context) for text, context in zip(texts, pairs or [""] * len(texts), strict=True)]

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Checks that something is left to learn, that it fits the backbone, and that packed examples stay apart."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and self.settings.max_length > positions:
            raise DataError(
                f"task.max_length is {self.settings.max_length}, but the backbone has {positions} positions. Lower it."
            )
        if next(iter(batches()), None) is None:
            raise DataError(
                f"Nothing is left to learn of any training example: all prompts fill task.max_length="
                f"{self.settings.max_length}. Raise it, or set task.keep=tail."
            )
        if self.settings.packing:
            require_packable(model)

    @property
    def packs(self) -> bool:
        """Whether examples share a sequence."""
        return self.settings.packing

    def encode(self, inputs: Sequence[Prompt], processor: Any, targets: Sequence[str] | None = None) -> Any:
        """Tokenises prompts for generation or, with responses, sequences to learn, packed if that is asked for.

        What truncation left nothing to learn of is left out; `left_out` counts it.
        """
        settings = self.settings
        if targets is None:
            ids, cut = ask(inputs, processor, self.template, settings.max_length - settings.max_new_tokens)
            return datasets.Dataset.from_dict({"input_ids": ids, "cut": cut})
        kept = [one for one in self._complete(Examples(list(inputs), list(targets)), processor) if one.learned]
        return as_dataset(pack(kept, settings.max_length) if settings.packing else columns(kept))

    def judged(self, examples: Examples, processor: Any) -> Any:
        """Tokenises prompts with their responses, one feature each, never packed."""
        return as_dataset(columns(self._complete(examples, processor)))

    def left_out(self, examples: Examples, features: Any) -> tuple[str, ...]:
        """Says how many examples are cut at `max_length`, and how many have nothing left to learn."""
        length, total = self.settings.max_length, len(examples)
        cut, lost = ([count for counts in features[name] for count in counts] for name in ("cut", "lost"))
        shortened, gone = sum(count > 0 for count in lost), total - len(cut)
        longer = sum(count > 0 for count in cut) + gone
        notes = {
            f"training examples are longer than {length} tokens and were cut": longer,
            f"training responses lost their {END[self.settings.keep]}": shortened,
            "training examples were left out: nothing to learn was left": gone,
        }
        return tuple(f"{count} of {total} {what}" for what, count in notes.items() if count)

    def _complete(self, examples: Examples, processor: Any) -> list[Completion]:
        settings = self.settings
        limits = Limits(settings.max_length, settings.keep, settings.loss_on == "all")
        return complete(examples.inputs, examples.targets, processor, self.template, limits)

    def collator(self, processor: Any) -> Collator:
        """Pads sequences to learn on the right, packed ones without a mask, and prompts alone on the left."""
        return partial(collate, tokenizer=processor)

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Judges responses, or answers prompts where there are no responses."""
        if isinstance(batch, Prompts):
            return answer(model, batch, self.settings.max_new_tokens)
        return judge(model, batch)

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Judged]) -> dict[str, float]:
        """Computes the metrics of `metrics` over all tokens of the set, so that long responses count as such."""
        tokens = sum(one.tokens for one in outputs)
        if not tokens:
            raise DataError("Nothing is left of any response within task.max_length: there is nothing to judge.")
        loss = math.fsum(one.nll for one in outputs) / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # e^710 is more than a float holds
        return {
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": sum(one.right for one in outputs) / tokens,
        }

    def predict(self, inputs: Sequence[Prompt], features: Any, outputs: Sequence[Answer]) -> list[Generation]:
        """Returns what the model says to each prompt."""
        return [
            Generation(prompt.chat() if prompt.messages else prompt.text, said.text, said.finished, cut)
            for prompt, said, cut in zip(inputs, outputs, features["cut"], strict=True)
        ]
