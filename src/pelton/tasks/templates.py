"""How a prompt and a response become one text: a format string, the tokenizer's chat template, or nothing around it.

Every template says where the response begins: what comes before is what the model is given, what follows is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any, ClassVar, Protocol

from jinja2 import TemplateError

from pelton.errors import DataError
from pelton.tasks.conversations import Prompt

PLAIN = "{prompt}\n{response}"
ALPACA = "### Instruction:\n{prompt}\n\n### Response:\n{response}"
ALPACA_INPUT = "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n{response}"


class Template(Protocol):
    """What writes a prompt and its response.

    Attributes:
        starts: Whether the tokenizer's own start of text goes in front.
    """

    starts: ClassVar[bool]

    def render(self, prompt: Prompt, response: str | None, tokenizer: Any) -> tuple[str, str]:
        """Returns what is given and what is learned, without the end of text; the latter is empty without response."""


@dataclass(frozen=True)
class Formatted:
    """Format strings with `{prompt}`, `{input}` and `{response}`."""

    starts: ClassVar[bool] = True

    format: str
    format_with_input: str

    def render(self, prompt: Prompt, response: str | None, tokenizer: Any) -> tuple[str, str]:
        """Fills the format in; the one with `{input}` where the prompt has a context."""
        before, after = split_format(self.format_with_input if prompt.context else self.format)
        given = before.format(prompt=prompt.text, input=prompt.context)
        return given, "" if response is None else response + after.format()


@dataclass(frozen=True)
class Continued:
    """A text as it is: all of it is learned, and a beginning is gone on with."""

    starts: ClassVar[bool] = True

    def render(self, prompt: Prompt, response: str | None, tokenizer: Any) -> tuple[str, str]:
        """Adds nothing."""
        return prompt.text, response or ""


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template."""

    starts: ClassVar[bool] = False  # the template writes it

    def render(self, prompt: Prompt, response: str | None, tokenizer: Any) -> tuple[str, str]:
        """Writes the conversation up to the reply, and the reply.

        Raises:
            DataError: the template refuses the messages, or writes what comes before the reply otherwise when the
                reply is there, so that what is learned is not what will be asked.
        """
        messages = prompt.chat()
        given = _apply(tokenizer, messages, add_generation_prompt=True)
        if response is None:
            return given, ""
        whole = _apply(tokenizer, [*messages, {"role": "assistant", "content": response}], add_generation_prompt=False)
        if not whole.startswith(given):
            raise DataError(
                "The chat template writes a conversation otherwise once its reply is there: expected "
                f"{given[-60:]!r} before the reply, but got {whole[max(0, len(given) - 60) : len(given)]!r}. "
                "Use a template whose generation prompt is what it writes before a reply, or task.template=plain."
            )
        learned, end = whole[len(given) :], tokenizer.eos_token
        return given, learned.rstrip().removesuffix(end) if learned.rstrip().endswith(end) else learned


def split_format(text: str) -> tuple[str, str]:
    """Returns what a format has before and after its `{response}`.

    Raises:
        ValueError: it has not one `{response}`, no `{prompt}` before it, or another field.
    """
    try:
        fields = [(name, spec or change) for _, name, spec, change in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"the format {text!r} cannot be read ({error}); write {{{{ for a brace") from error
    names = [name for name, _ in fields]
    if any(extra for _, extra in fields) or not set(names) <= {"prompt", "input", "response"}:
        raise ValueError(f"a format knows {{prompt}}, {{input}} and {{response}}, but got {text!r}")
    if names.count("response") != 1 or names[-1] != "response" or "prompt" not in names:
        raise ValueError(f"a format has {{prompt}} and, last of its fields, one {{response}}, but got {text!r}")
    before, _, after = text.rpartition("{response}")
    return before, after


def _apply(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"The tokenizer's chat template refuses a conversation of {roles}: {error}.") from error
    return text
