"""Causal language modelling: responses to prompts (instruction tuning), replies in conversations, or plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import datasets

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.completions import IGNORED, Completion, Limits, as_dataset, ask, columns, complete
from pelton.tasks.conversations import Prompt, find_fields, read_examples, read_prompts
from pelton.tasks.decoding import Answer, Judged, Prompts, answer, collate, judge
from pelton.tasks.packing import pack, require_packable
from pelton.tasks.positions import require_positions
from pelton.tasks.tables import Table
from pelton.tasks.templates import Chat, Continued, Formatted, Template
from pelton.tasks.texts import require_texts, require_unicode

CHUNK = 500
END = {"head": "end", "tail": "beginning"}
"""What a response loses where an end of it is kept."""


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
        for number, context in enumerate(pairs or [], 1):
            require_unicode(context, f"Input {number}")
        contexts = [context if context.strip() else "" for context in pairs or [""] * len(texts)]
        return [Prompt(text, context) for text, context in zip(require_texts(texts), contexts, strict=True)]

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Checks that something is left to learn, that it fits the backbone, and that packed examples stay apart."""
        require_positions(model, "max_length", self.settings.max_length)
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

    def require_judgeable(self, split: str, examples: Examples, processor: Any) -> None:
        """Raises DataError where no response has a token within `max_length`."""
        for start in range(0, len(examples), CHUNK):
            some = examples.take(range(start, min(start + CHUNK, len(examples))))
            if any(one.learned for one in self._complete(some, processor)):
                return
        raise DataError(
            f"Nothing is left to judge of any response of the {split} rows: all prompts fill task.max_length="
            f"{self.settings.max_length}. Raise it, or set task.keep=tail."
        )

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Says how many examples are cut at `max_length`, and how many have nothing left to learn, or to judge."""
        if split != "training":
            return self._unjudged(features, split)
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

    def _unjudged(self, features: Any, split: str) -> tuple[str, ...]:
        shortened = sum(count > 0 for (count,) in features["lost"])
        gone = sum(all(label == IGNORED for label in labels) for labels in features["labels"])
        notes = {
            f"{split} responses lost their {END[self.settings.keep]} at task.max_length": shortened,
            f"{split} examples have nothing of their response left and are not judged": gone,
        }
        return tuple(f"{count} of {len(features)} {what}" for what, count in notes.items() if count)

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
