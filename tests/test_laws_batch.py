"""Laws 4 and 5: padding, neighbours, the future, and the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from law import GATES, METHODS, attached, far, together, wake
from pelton import FixedGate, MLPGate, PeltonConfig, Prefix
from zoo import ARCHS, SEQ, VOCAB, Arch

TEXTS = [name for name, a in ARCHS.items() if a.kind == "text"]
PADDED = [name for name, a in ARCHS.items() if a.padded]
CAUSAL = [name for name, a in ARCHS.items() if a.kind == "text" and a.causal]


def _pad(inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    more = {k: torch.nn.functional.pad(inputs[k], (0, by)) for k in ("input_ids", "attention_mask")}
    return inputs | more


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", PADDED)
def test_more_padding_changes_nothing(name: str, gate: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    model = attached(arch, gate)
    with torch.no_grad():
        short, long = arch.run(model, inputs), arch.run(model, _pad(inputs, 5))
    if arch.kind == "text" and short.dim() == 3:
        assert far(long[:, SEQ:], torch.zeros(())) == 0
        long = long[:, :SEQ]
    assert far(short, long) <= 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_what_the_padding_holds_changes_nothing(name: str, side: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    model = attached(arch)
    mask = inputs["attention_mask"]
    if side == "left":
        mask = mask.flip(1)
        inputs = inputs | {"input_ids": inputs["input_ids"].flip(1), "attention_mask": mask}
        inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if arch.causal and arch.kind == "text" else {}
    other = inputs | {"input_ids": torch.where(mask == 1, inputs["input_ids"], 7)}
    if name == "roberta":  # its positions come from the ids
        other["position_ids"] = inputs["position_ids"] = torch.arange(SEQ).expand_as(mask) + 1

    def states(batch: dict[str, Tensor]) -> Tensor:
        if arch.causal:
            return arch.run(model, batch)
        return model(**batch, output_hidden_states=True).hidden_states[-1] * mask[..., None]

    with torch.no_grad():
        assert far(states(inputs), states(other)) <= 1e-6


def test_neighbours_change_nothing(arch: Arch) -> None:
    model, inputs = attached(arch), arch.inputs()
    with torch.no_grad():
        batch = arch.run(model, inputs)
        turned = arch.run(model, {k: v.flip(0) for k, v in inputs.items()})
        alone = torch.cat([arch.run(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(3)])
    assert far(batch, turned.flip(0)) <= 1e-6
    assert far(batch, alone) <= 1e-6


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_leave_earlier_logits_alone(name: str, gate: str) -> None:
    arch, model = ARCHS[name], attached(ARCHS[name], gate)
    ids = torch.randint(3, VOCAB, (2, SEQ))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % (VOCAB - 3) + 3
    with torch.no_grad():
        a, b = arch.run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), None
        b = arch.run(model, {"input_ids": changed, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert far(a[:, -1], b[:, -1]) > 0


def _generate(model: Any, ids: Tensor, mask: Tensor, cache: bool) -> tuple[Tensor, Tensor]:
    more = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, pad_token_id=0, eos_token_id=None, **more)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bart"])
def test_generation_with_cache_equals_without(name: str, side: str) -> None:
    model = attached(ARCHS[name])
    ids = torch.randint(3, VOCAB, (2, SEQ))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[1, :3] = 0
    with torch.no_grad():
        cached, with_cache = _generate(model, ids, mask, True)
        plain, without = _generate(model, ids, mask, False)
    assert torch.equal(cached, plain)
    assert far(with_cache, without) <= 2e-6


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_a_cache_of_fixed_size_changes_nothing(name: str) -> None:
    arch = ARCHS[name]
    model, ids = attached(arch), torch.randint(3, VOCAB, (2, SEQ))
    more = {"use_cache": True, "past_key_values": StaticCache(config=model.config, max_cache_len=16)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if arch.kind == "seq2seq":
        inputs["decoder_input_ids"] = ids
        cross = DynamicCache(config=model.config)
        more["past_key_values"] = EncoderDecoderCache(more["past_key_values"], cross)
    with torch.no_grad():
        assert far(arch.run(model, inputs, use_cache=False), model(**inputs, **more).logits) <= 2e-6


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["prefix-kv", "prefix-mlp", "prefix-token"])
@pytest.mark.parametrize("name", [n for n, a in ARCHS.items() if a.prefix])
def test_prefix_acts_and_learns(name: str, method: str, attention: str, side: str) -> None:
    arch = ARCHS[name]
    if side != "none" and not arch.padded:
        pytest.skip("images and sounds are not padded")
    inputs = arch.inputs()
    if side == "left":
        inputs = inputs | {k: inputs[k].flip(1) for k in ("input_ids", "attention_mask")}
    elif side == "none" and "attention_mask" in inputs:
        inputs = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    model = attached(arch, FixedGate(0.5), [METHODS[method]])
    model.get_base_model().set_attn_implementation(attention)
    out = arch.run(model, inputs)
    out.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if ".pelton.methods." in n}
    for key, grad in grads.items():
        assert grad is not None, key
        assert torch.isfinite(grad).all(), key
        assert grad.abs().max() > 0, key
    with torch.no_grad(), model.disable_adapter():
        assert far(out, arch.run(model, inputs)) > 1e-6


@pytest.mark.parametrize("name", [n for n, a in ARCHS.items() if a.prefix and a.kind == "text"])
def test_sdpa_and_eager_agree(name: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    model = attached(arch)
    with torch.no_grad():
        sdpa = arch.run(model, inputs)
        model.get_base_model().set_attn_implementation("eager")
        seen = model(**inputs, output_attentions=True)
        assert far(sdpa, arch.run(model, inputs)) <= 2e-6
    weights = seen.attentions[0]
    assert weights.shape[-1] == SEQ
    assert (weights.sum(-1)[0] < 1 - 1e-4).all()  # what is missing went to the prefix


def test_scale_gating_is_the_published_form() -> None:
    arch = ARCHS["bert"]
    inputs = arch.inputs()
    mass = attached(arch, FixedGate(1.0), [Prefix(prefix_length=3)])
    scale = attached(arch, FixedGate(1.0), [Prefix(prefix_length=3, gating="scale")])
    with torch.no_grad():
        assert far(arch.run(mass, inputs), arch.run(scale, inputs)) <= 1e-6  # open, they agree
        closed = attached(arch, FixedGate(0.0), [Prefix(prefix_length=3, gating="scale")])
        assert far(arch.run(arch.build(), inputs), arch.run(closed, inputs)) > 1e-6  # closed, a zero key still draws


def test_token_granularity_in_encoders_ignores_padding() -> None:
    arch = ARCHS["bert"]
    inputs = arch.inputs()
    model = attached(arch, MLPGate(hidden_size=8, granularity="token", init_std=0.5), together(arch))
    with torch.no_grad():
        assert far(arch.run(model, inputs), arch.run(model, _pad(inputs, 4))) <= 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own flex attention
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_blocks_with_a_prefix_fall_back_from_flex_attention(name: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    with torch.no_grad():
        expected = arch.run(attached(arch), inputs)
        backbone = arch.build()
        backbone.set_attn_implementation("flex_attention")
        with pytest.warns(UserWarning, match="'flex_attention' attention cannot carry a prefix"):
            model = wake(get_peft_model(backbone, PeltonConfig(methods=together(arch), gate=GATES["mlp"]))).eval()
        assert far(expected, arch.run(model, inputs)) <= 1e-6
