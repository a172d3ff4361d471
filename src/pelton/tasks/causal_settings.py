"""What a language model is to learn: which columns, how they are written, how much of them is kept."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pelton.errors import DataError
from pelton.tasks.conversations import Fields
from pelton.tasks.settings import Count, TaskSettings
from pelton.tasks.templates import ALPACA, ALPACA_INPUT, PLAIN, split_format


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
