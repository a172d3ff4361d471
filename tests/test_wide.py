"""Laws on many more architectures: closed is exact, padding and neighbours do nothing, nothing sees the future."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor

from pelton import DilatedAttention, FixedGate, PeltonConfig, Prefix, ScalarGate
from pelton.errors import AnatomyError
from pelton.methods.base import MethodSpec
from wide import DECODERS, ENCODERS, REFUSED, SEQ2SEQ, STATIC, VOCAB

ROWS, LENGTH, REAL = 3, 8, 5


def build(name: str, values: dict[str, Any], auto: Any) -> Any:
    torch.manual_seed(0)
    return auto.from_config(getattr(tf, f"{name}Config")(**values)).eval()


def gated(model: Any, name: str) -> Any:
    config = PeltonConfig(gate=ScalarGate(0.5)) if name in STATIC else PeltonConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a method of the default that an architecture has no place for
        return get_peft_model(model, config).eval()


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".pelton." in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def run(model: Any, **inputs: Tensor) -> Tensor:
    output = model(**inputs)
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state  # type: ignore[no-any-return]


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(5, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, Tensor]:
    """The first row has padding behind its tokens."""
    ids = tokens(0)
    ids[0, REAL:] = 1
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def first_row(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first row alone, without padding."""
    cut = {"input_ids": REAL, "attention_mask": REAL}
    return {key: value[:1, : cut.get(key)] for key, value in inputs.items()}


def changed_at_the_end(inputs: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    ids = inputs[key].clone()
    ids[1:, -1] = 4
    return {**inputs, key: ids}


def assert_lawful(
    base: Any, name: str, inputs: dict[str, Tensor], key: str, causal: bool, method: MethodSpec | None = None
) -> None:
    """Compares the gated model with its backbone, whose own small deviations it may double."""
    with torch.no_grad():
        plain = run(base, **inputs)
        alone = run(base, **first_row(inputs))
        noise = float((alone - plain[:1, : alone.shape[1]]).abs().max())
        later = run(base, **changed_at_the_end(inputs, key))
        causal = causal and bool((later - plain)[:, :-1].abs().max() < 1e-6)  # FSMT's decoder itself is not
        if method is None:
            model = gated(base, name)
        else:
            closed = get_peft_model(base, PeltonConfig(methods=[method], gate=FixedGate(0.0))).eval()
            shake(closed)
            assert run(closed, **inputs).sub(plain).abs().max() <= 1e-5, "a closed gate is not the backbone"
            model = get_peft_model(closed.unload(), PeltonConfig(methods=[method])).eval()
        assert method or run(model, **inputs).sub(plain).abs().max() <= 1e-6, "what adds nothing changes the backbone"
        shake(model)
        output = run(model, **inputs)
        assert (output - plain).abs().max() > 1e-3, "nothing is attached"
        alone = run(model, **first_row(inputs))
        torch.testing.assert_close(alone, output[:1, : alone.shape[1]], atol=1e-5 + 10 * noise, rtol=1e-4)
        if causal:
            other = run(model, **changed_at_the_end(inputs, key))
            torch.testing.assert_close(other[:, :-1], output[:, :-1], atol=1e-5 + 10 * noise, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    auto = tf.TrOCRForCausalLM if name == "trocr" else tf.AutoModelForCausalLM
    base = build(*DECODERS[name], auto=type("", (), {"from_config": lambda c: auto(c)}) if name == "trocr" else auto)
    ids = tokens(0)
    assert_lawful(base, name, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "input_ids", causal=True)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    assert_lawful(build(*ENCODERS[name], auto=tf.AutoModel), name, padded(), "input_ids", causal=False)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders(name: str) -> None:
    base = build(*SEQ2SEQ[name], auto=tf.AutoModelForSeq2SeqLM)
    inputs = padded() | {"decoder_input_ids": tokens(1, length=6)}
    assert_lawful(base, name, inputs, "decoder_input_ids", causal=True)


INSIDE = [
    "opt",
    "llama4",
    "mixtral",
    "olmo-hybrid",
    "layoutlm",
    "esm",
    "eurobert",
    "m2m-100",
    "switch-transformers",
    "umt5",
]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("method", [Prefix(prefix_length=3), DilatedAttention(segment=4)], ids=["prefix", "dilated"])
def test_methods_inside_the_attention(name: str, method: MethodSpec) -> None:
    ids = tokens(0)
    if name in DECODERS:
        inputs, key, base = {"input_ids": ids}, "input_ids", build(*DECODERS[name], auto=tf.AutoModelForCausalLM)
    elif name in ENCODERS:
        inputs, key, base = padded(), "input_ids", build(*ENCODERS[name], auto=tf.AutoModel)
    else:
        inputs, key = padded() | {"decoder_input_ids": tokens(1, length=6)}, "decoder_input_ids"
        base = build(*SEQ2SEQ[name], auto=tf.AutoModelForSeq2SeqLM)
    assert_lawful(base, name, inputs, key, name not in ENCODERS, method)


@pytest.mark.parametrize("name", ["opt", "xglm", "gpt-neox", "bloom", "deepseek-v3", "qwen2-moe", "olmo-hybrid"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = gated(build(*DECODERS[name], auto=tf.AutoModelForCausalLM), name)
    shake(model)
    options = {"input_ids": tokens(0), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gated_says_why(name: str) -> None:
    config, values, message = REFUSED[name]
    auto = tf.AutoModelForSeq2SeqLM if name == "prophetnet" else tf.AutoModel
    with pytest.raises(AnatomyError) as found:
        get_peft_model(build(config, values, auto), PeltonConfig())
    assert message in str(found.value)


@pytest.mark.parametrize("name", STATIC)
def test_gates_that_read_the_input_are_refused_where_tokens_lie_otherwise(name: str) -> None:
    table, auto = (ENCODERS, tf.AutoModel) if name in ENCODERS else (SEQ2SEQ, tf.AutoModelForSeq2SeqLM)
    with pytest.raises(AnatomyError, match=r"cannot read the input, since .* Use one that does not: 'scalar'"):
        get_peft_model(build(*table[name], auto=auto), PeltonConfig())


def test_an_unknown_layout_of_padding_takes_gates_of_tokens() -> None:
    from pelton import MLPGate

    base = build(*SEQ2SEQ["longt5"], auto=tf.AutoModelForSeq2SeqLM)
    with pytest.raises(AnatomyError, match="does not tell padding in a known way"):
        get_peft_model(base, PeltonConfig(gate=MLPGate(granularity="example")))
