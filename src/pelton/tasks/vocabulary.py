"""A tokenizer learned from the training text, for a language model that starts from nothing.

`char` has one token for each character that occurs, and one for all that do not. `bpe` begins with the 256 bytes, so
that no text is unknown to it, and joins the pair that is most frequent until its vocabulary is full (Sennrich et al.
2016, arXiv 1508.07909, on bytes as in GPT-2). Both have a token between texts, which also stands at their beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pelton.errors import DataError

Kind = Literal["char", "bpe"]
END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
MARK = "learned_by_pelton"
"""What a learned tokenizer's own config says of its kind."""
BYTES = 256
USUAL_BPE = 2048


def learn_tokenizer(texts: Sequence[str], kind: Kind, vocab_size: int | None) -> Any:
    """Learns a fast tokenizer of transformers.

    Args:
        texts: Those of training.
        kind: `char` or `bpe`.
        vocab_size: How many tokens at most, the special ones among them. When not given, all characters, or 2048.

    Raises:
        DataError: a size that does not even hold the special tokens and the bytes, or one character.
    """
    from transformers import PreTrainedTokenizerFast

    least = 3 if kind == "char" else BYTES + 1
    if vocab_size is not None and vocab_size < least:
        raise DataError(f"task.vocab_size is {vocab_size}, but {kind} needs {least} or more tokens. Raise it.")
    tokenizer = _characters(texts, vocab_size) if kind == "char" else _pairs(texts, vocab_size or USUAL_BPE)
    special = {"bos_token": END, "eos_token": END, "pad_token": END} | (
        {"unk_token": UNKNOWN} if kind == "char" else {}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special, **{MARK: kind}
    )


def require_same(tokenizer: Any, kind: Kind | None) -> None:
    """Raises DataError where a recipe asks for a learned tokenizer, but the backbone has another."""
    own = tokenizer.init_kwargs.get(MARK)
    if kind is not None and own != kind:
        other = "one of its own" if own is None else repr(own)
        raise DataError(
            f"task.tokenizer is {kind!r}, but the backbone comes with {other}. Leave it out, or start with "
            "backbone=new:MODEL_TYPE."
        )


def _characters(texts: Sequence[str], vocab_size: int | None) -> Any:
    """One token a character, in the order of code points; the most frequent ones where not all have room."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    found = Counter[str]()
    for text in texts:
        found.update(text)
    kept = [one for one, _ in found.most_common(None if vocab_size is None else vocab_size - 2)]
    vocabulary = {token: place for place, token in enumerate([END, UNKNOWN, *sorted(kept)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _pairs(texts: Sequence[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
