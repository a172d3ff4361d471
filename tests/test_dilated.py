"""Dilated attention: against a naive reference over all pairs, its gate, its laws and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from law import METHODS, attached, far
from pelton import (
    DilatedAttention,
    FixedGate,
    FrozenGate,
    LoRA,
    MLPGate,
    PeltonConfig,
    ScalarGate,
    find_anatomy,
    freeze_gates,
    gate_summary,
    gated_blocks,
    prune,
    revive,
    set_stage,
)
from pelton.errors import AdapterError, AnatomyError, SpecError, UnknownName
from pelton.methods import DilatedPart, Grid, Shape, View
from zoo import ARCHS, DECODER, SEQ, TEXT, VISION, VOCAB

B, H, T, K = 2, 4, 13, 8
SCALE = K**-0.5


def part_of(kv_heads: int = H, grid: Grid | None = None, **spec: Any) -> DilatedPart:
    return DilatedAttention(**spec).build(Shape("attn", 32, 32, kv_heads, K, H, grid))


def qkv(tokens: int = T, kv_heads: int = H, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(B, n, tokens, K, generator=g) for n in (H, kv_heads, kv_heads))
    return query, key, value


def naive(q: Tensor, k: Tensor, v: Tensor, patterns: list[Tensor], bias: Tensor | float = 0.0) -> Tensor:
    """One softmax over the keys of all patterns [B or 1, H or 1, T, T], with all pairs; [B, T, H, K]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * SCALE + bias
    scores = torch.cat([scores.masked_fill(~p, torch.finfo(scores.dtype).min) for p in patterns], -1)
    return (scores.softmax(-1) @ torch.cat([v] * len(patterns), 2)).transpose(1, 2)


def pattern(places: Tensor, segment: int, dilation: int) -> Tensor:
    """Which pairs a rate keeps, [B, 1, T, T], of tokens at given positions [B, T]."""
    i, j = places[:, None, :, None], places[:, None, None, :]
    return (i // segment == j // segment) & ((i - j) % dilation == 0)


def padded(side: str) -> Tensor:
    """Which tokens are real, [B, T]."""
    real = torch.ones(B, T, dtype=torch.bool)
    if side == "left":
        real[1, :5] = False
    elif side == "right":
        real[1, -5:] = False
    elif side == "both":
        real[0, :2] = real[1, -3:] = real[1, :1] = False
    return real


RATES: dict[str, dict[str, Any]] = {
    "one": {"segment": 4, "dilation": 1},
    "dilated": {"segment": 4, "dilation": 2},
    "odd": {"segment": 6, "dilation": 3},
    "alone": {"segment": 4, "dilation": 4},
    "longer": {"segment": 64, "dilation": 4},
    "mixed": {"segment": (4, 8), "dilation": (1, 2)},
    "three": {"segment": (3, 6, 32), "dilation": (1, 3, 2)},
    "heads": {"segment": (4, 6), "dilation": 2, "heads": (0, 3)},
    "one-head": {"segment": 6, "dilation": 2, "heads": (2,)},
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rates", RATES)
def test_sequences_equal_the_naive_reference(rates: str, causal: bool, side: str, kv_heads: int) -> None:
    part, (q, k, v), real = part_of(kv_heads=kv_heads, **RATES[rates]), qkv(kv_heads=kv_heads), padded(side)
    places = real.long().cumsum(1) - 1
    sees = real[:, None, None] & (torch.ones(T, T).tril().bool() if causal else torch.tensor(True))
    sees = sees.expand(B, 1, T, T)
    patterns = [pattern(places, *rate) & sees for rate in part.rates]
    expected = naive(q, k, v, patterns)[:, :, list(part.heads)]
    views = [View(SCALE, mask=sees, real=real)]
    views.append(View(SCALE, mask=torch.where(sees, 0.0, torch.finfo(torch.float32).min), real=real))
    if side == "none":
        views.append(View(SCALE, causal=causal))
    for view in views:
        out = part(q, k, v, view)
        assert torch.isfinite(out).all()
        assert far(expected[real], out[real]) <= 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rates", ["dilated", "three", "heads"])
def test_position_biases_count(rates: str, masked: bool) -> None:
    part, (q, k, v), bias = part_of(**RATES[rates]), qkv(), torch.randn(1, H, T, T)
    tril = torch.ones(T, T).tril().bool()[None, None]
    patterns = [pattern(torch.arange(T)[None], *rate) & tril for rate in part.rates]
    view = View(SCALE, mask=tril.expand(B, 1, T, T) if masked else None, causal=True, bias=bias)
    assert far(naive(q, k, v, patterns, bias)[:, :, list(part.heads)], part(q, k, v, view)) <= 1e-5


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rates", RATES)
def test_new_tokens_with_a_cache_equal_the_whole_sequence(
    rates: str, kv_heads: int, new: int, window: int | None
) -> None:
    part, (q, k, v), real = part_of(kv_heads=kv_heads, **RATES[rates]), qkv(kv_heads=kv_heads), padded("left")
    now, then = torch.arange(T)[:, None], torch.arange(T)
    sees = real[:, None, None] & (then <= now)
    if window:
        sees = sees & (then > now - window)
    whole = part(q, k, v, View(SCALE, mask=sees, real=real))
    kept = slice(None) if window is None else slice(T - window - new + 1, None)  # as a cache with a window keeps them
    places = None if window is None else (real.long().cumsum(1) - 1)[:, -new:]
    view = View(SCALE, mask=sees[:, :, -new:, kept], places=places)
    assert far(whole[:, -new:], part(q[:, :, -new:], k[:, :, kept], v[:, :, kept], view)) <= 1e-5


# ---- images ------------------------------------------------------------------------------------------------------


def nearest(side: int, kernel: int, dilation: int) -> list[list[int]]:
    """For each place along a side the k nearest of its residue class: clamped windows are nothing else."""
    classes = [[j for j in range(side) if (i - j) % dilation == 0] for i in range(side)]
    return [sorted(some, key=lambda j: abs(i - j))[:kernel] for i, some in enumerate(classes)]


def grid_pattern(rows: int, columns: int, special: int, kernel: int, dilation: int) -> Tensor:
    """Which pairs the neighbourhoods keep, [1, 1, T, T]."""
    tokens = special + rows * columns
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    down, across = nearest(rows, kernel, dilation), nearest(columns, kernel, dilation)
    for i in range(rows):
        for j in range(columns):
            for a in down[i]:
                sees[special + i * columns + j, [special + a * columns + b for b in across[j]]] = True
    return sees[None, None]


GRIDS: dict[str, tuple[Grid, dict[str, Any]]] = {
    "plain": (Grid(5, 5), {"kernel": 3, "dilation": 1}),
    "cls": (Grid(4, 4, 1), {"kernel": 3, "dilation": 1}),
    "dilated": (Grid(6, 7, 1), {"kernel": 3, "dilation": 2}),
    "wide": (Grid(5, 8, 2), {"kernel": 5, "dilation": 1}),
    "far": (Grid(9, 10, 5), {"kernel": 3, "dilation": 3}),
    "heads": (Grid(6, 6, 1), {"kernel": 3, "dilation": 2, "heads": (1, 2)}),
    "mixed": (Grid(6, 6, 1), {"kernel": (5, 3), "dilation": (1, 2)}),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_grids_equal_the_naive_reference(name: str, biased: bool) -> None:
    grid, spec = GRIDS[name]
    tokens = grid.special + grid.rows * grid.columns
    part, (q, k, v) = part_of(grid=grid, **spec), qkv(tokens)
    bias = torch.randn(1, H, tokens, tokens) if biased else torch.zeros(1, H, tokens, tokens)
    patterns = [grid_pattern(grid.rows, grid.columns, grid.special, *rate) for rate in part.rates]
    patterns[0][..., : grid.special] = True  # once, whatever the number of rates
    expected = naive(q, k, v, patterns, bias)
    everything = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    expected[:, : grid.special] = naive(q, k, v, [everything], bias)[:, : grid.special]
    out = part(q, k, v, View(SCALE, mask=bias if biased else None))
    assert far(expected[:, :, list(part.heads)], out) <= 1e-5


def test_images_of_other_sizes_have_other_grids() -> None:
    part = part_of(grid=Grid(4, 4, 1), kernel=3, dilation=1)
    q, k, v = qkv(1 + 25)
    patterns = [grid_pattern(5, 5, 1, 3, 1)]
    patterns[0][..., 0] = patterns[0][..., 0, :] = True
    assert far(naive(q, k, v, patterns), part(q, k, v, View(SCALE))) <= 1e-5
    with pytest.raises(AdapterError, match="The grid of 12 patches cannot be told: expected 4 × 4"):
        part(*qkv(13), View(SCALE))
    with pytest.raises(SpecError, match=r"`kernel \* dilation <= 2 on a grid of 2 × 2 patches`"):
        part(*qkv(5), View(SCALE))


def test_image_encoders_say_how_their_patches_lie() -> None:
    grids = {name: [block.grid for block in find_anatomy(arch.build()).blocks] for name, arch in ARCHS.items()}
    assert {name for name, some in grids.items() if any(g and g.known for g in some)} >= {"vit", "dinov2", "beit"}
    assert all(set(grids[name]) == {Grid(4, 4, 1)} for name in ("vit", "dinov2", "beit"))
    assert set(grids["clip"]) == {None, Grid(4, 4, 1)}
    assert set(grids["bert"]) == {None}
    deit = tf.DeiTModel(tf.DeiTConfig(**VISION | {"image_size": (16, 24)}))
    registers = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3))
    assert find_anatomy(deit).blocks[0].grid == Grid(4, 6, 2)
    assert find_anatomy(registers).blocks[0].grid == Grid(4, 4, 4)


# ---- in the model ------------------------------------------------------------------------------------------------


def plain(arch: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return arch.run(arch.build(), inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["dilated", "dilated-rates"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gemma3", "modernbert", "minigpt-alibi"])
def test_a_closed_gate_is_the_backbone_to_the_bit(name: str, method: str, attention: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    model, backbone = attached(arch, FixedGate(0.0), [METHODS[method]]), arch.build()
    for one in (model.get_base_model(), backbone):
        one.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.equal(arch.run(model, inputs), arch.run(backbone, inputs))


def test_an_open_gate_is_dilated_attention_alone() -> None:
    """The backbone under a mask of the same pattern."""
    arch = ARCHS["bert"]
    for spec in (METHODS["dilated"], DilatedAttention(segment=6, dilation=3)):
        inputs = arch.inputs()
        sees = pattern(torch.arange(SEQ)[None], spec.segment, spec.dilation)
        sees = sees & inputs["attention_mask"][:, None, None].bool()
        sees = sees | ~sees.any(-1, keepdim=True)
        with torch.no_grad():
            out = arch.run(attached(arch, FixedGate(1.0), [spec]), inputs)
            assert far(arch.run(arch.build(), inputs | {"attention_mask": sees}), out) <= 1e-6
            assert far(plain(arch, inputs), out) > 1e-5


def test_mixing_is_exact_at_both_ends() -> None:
    part = part_of(segment=4, heads=(1, 3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        original, dilated = torch.randn(B, T, H, K).to(dtype), torch.randn(B, T, 2, K).to(dtype)
        assert torch.equal(part.mix(original, dilated, torch.zeros(1, 1, 1)), original)
        opened = part.mix(original, dilated, torch.ones(B, T, 1))
        assert torch.equal(opened[:, :, [1, 3]], dilated)
        assert torch.equal(opened[:, :, [0, 2]], original[:, :, [0, 2]])
        assert opened.dtype == dtype


def test_left_padding_moves_no_segment() -> None:
    """A row alone equals the row behind any number of padding tokens."""
    arch = ARCHS["llama"]
    model = attached(arch, FixedGate(0.7), [DilatedAttention(segment=4, dilation=2)])
    ids = torch.randint(3, VOCAB, (1, SEQ))
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        for by in (1, 2, 3, 5):
            padded_ids = torch.nn.functional.pad(ids, (by, 0))
            mask = (torch.arange(SEQ + by) >= by).long()[None]
            places = (mask.cumsum(1) - 1).clamp_min(0)
            out = model(input_ids=padded_ids, attention_mask=mask, position_ids=places).logits
            assert far(alone, out[:, by:]) <= 2e-6


@pytest.mark.parametrize("method", ["dilated", "dilated-rates"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen3", "gpt2", "minigpt", "minigpt-alibi"])
@pytest.mark.parametrize("cache", ["grows", "static"])
def test_chunks_with_a_cache_equal_the_whole(name: str, method: str, cache: str) -> None:
    arch = ARCHS[name]
    model = attached(arch, MLPGate(hidden_size=8, activation="sigmoid", init_std=0.5), [METHODS[method]])
    ids = torch.randint(3, VOCAB, (2, 11))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        past = tf.StaticCache(config=model.config, max_cache_len=16) if cache == "static" else None
        parts, at = [], 0
        for size in (5, 3, 1, 2):
            out = model(input_ids=ids[:, at : at + size], past_key_values=past, use_cache=True)
            past, at = out.past_key_values, at + size
            parts.append(out.logits)
    assert far(whole, torch.cat(parts, 1)) <= 2e-6


def test_packed_examples_do_not_see_each_other() -> None:
    arch = ARCHS["llama"]
    model = attached(arch, FixedGate(0.7), [DilatedAttention(segment=8, dilation=2)])
    ids, places = torch.randint(3, VOCAB, (1, 10)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    other = torch.cat([torch.randint(3, VOCAB, (1, 4)), ids[:, 4:]], 1)
    with torch.no_grad():
        a, b = (model(input_ids=x, position_ids=places, use_cache=False).logits for x in (ids, other))
    assert far(a[:, 4:], b[:, 4:]) == 0
    assert far(a[:, :4], b[:, :4]) > 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_prefixes_belong_to_the_original_attention(value: float) -> None:
    arch, inputs = ARCHS["bert"], ARCHS["bert"].inputs()
    both = [METHODS["prefix-kv"], METHODS["dilated"]]
    alone = both[:1] if value == 0.0 else both[1:]
    mixed = attached(arch, FixedGate({"prefix": 1.0, "dilated": value}), both)
    single = attached(arch, FixedGate(1.0), alone)
    own = {n: p for n, p in single.named_parameters() if ".prefix." in n}
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if name in own:
                own[name].copy_(parameter)
        assert far(arch.run(mixed, inputs), arch.run(single, inputs)) <= 1e-6


def test_eager_weights_are_the_originals() -> None:
    arch, inputs = ARCHS["bert"], ARCHS["bert"].inputs()
    model, backbone = attached(arch, FixedGate(0.5), [METHODS["dilated"]]), arch.build()
    with torch.no_grad():
        for one in (model.get_base_model(), backbone):
            one.set_attn_implementation("eager")
        seen, expected = (m(**inputs, output_attentions=True).attentions[0] for m in (model, backbone))
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    "spec",
    [
        {"segment": 4, "space": "sequence"},
        {"segment": (4, 8), "space": "sequence"},
        {"kernel": 3, "space": "grid", "dilation": 1},
    ],
)
def test_attention_dropout_is_respected(spec: dict[str, Any]) -> None:
    part, inputs = part_of(grid=Grid(3, 4, 1), **spec), qkv()
    certain = part(*inputs, View(SCALE))
    drawn = torch.stack([part(*inputs, View(SCALE, dropout=0.2)) for _ in range(400)])
    assert far(drawn[0], drawn[1]) > 1e-3
    assert far(certain, drawn.mean(0)) < 0.25  # weights are scaled up, so that the mean stays


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("form", ["fused", "rates", "grid"])
def test_nothing_grows_with_the_square_of_the_length(form: str) -> None:
    sizes = []
    for tokens in (24**2, 48**2):
        side = int(tokens**0.5)
        spec: dict[str, Any] = {"segment": 16} if form == "fused" else {"segment": (16, 32), "dilation": (1, 4)}
        if form == "grid":
            spec = {"kernel": 3, "dilation": (1, 2), "space": "grid"}
        part = part_of(grid=Grid(side, side) if form == "grid" else None, **spec)
        inputs = [x.requires_grad_() for x in qkv(tokens)]
        with Largest() as seen:
            part(*inputs, View(SCALE)).sum().backward()
        sizes.append(seen.numel)
    assert sizes[1] == 4 * sizes[0]
    assert sizes[1] < tokens**2


# ---- the gate ----------------------------------------------------------------------------------------------------


def tiny(**more: Any) -> Any:
    torch.manual_seed(0)
    config = tf.BertConfig(**TEXT | dict(hidden_size=16, intermediate_size=16, num_attention_heads=2), **more)
    return tf.BertForSequenceClassification(config)


def test_fixed_ratios_never_move(tmp_path: Path) -> None:
    config = PeltonConfig.dilated(
        DilatedAttention(segment=4), stage="finetune", finetune_dilated_ratio=0.02, others=[LoRA(rank=2)]
    )
    model = get_peft_model(tiny(), config).train()
    gates = [block.gates["default"] for block in gated_blocks(model)]
    before = [{key: value.clone() for key, value in gate.state_dict().items()} for gate in gates]
    for parameter in model.parameters():
        parameter.requires_grad = True  # the whole backbone learns
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids, labels = torch.randint(3, VOCAB, (2, 6)), torch.tensor([0, 1])
    for _ in range(1000):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    for gate, was in zip(gates, before, strict=True):
        assert all(torch.equal(value, was[key]) for key, value in gate.state_dict().items())
        assert not list(gate.parameters())
        assert torch.equal(gate.state_dict()["value"], before[0]["value"])  # the same in all layers
    table = gate_summary(model)
    assert table.dilated.tolist() == pytest.approx([0.02] * 2)
    assert (table.dilated + table.original == 1.0).all()
    assert table.is_buffer.all()
    assert not table.requires_grad.any()
    set_stage(model, "pretrain")
    assert gate_summary(model).dilated.tolist() == pytest.approx([0.01] * 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    for one, other in zip(gated_blocks(again), gated_blocks(model), strict=True):
        assert torch.equal(one.gates["default"].value, other.gates["default"].value)


def test_a_learned_gate_follows_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    arch, inputs = ARCHS["bert"], ARCHS["bert"].inputs()
    config = PeltonConfig(methods=[DilatedAttention(segment=4, dilation=2)], gate=ScalarGate(init=0.01))
    model = get_peft_model(arch.build().double(), config).eval()
    assert gate_summary(model).dilated.tolist() == pytest.approx([0.01] * 2, rel=1e-5)  # 0.01 means 0.01
    seen, mix = [], DilatedPart.mix

    def watched(part: DilatedPart, original: Tensor, dilated: Tensor, gate: Tensor) -> Tensor:
        out = mix(part, original, dilated, gate)
        if out.requires_grad:  # not in the forwards of the finite differences
            out.retain_grad()
            seen.append((original, dilated, out))
        return out

    monkeypatch.setattr(DilatedPart, "mix", watched)
    arch.run(model, inputs).square().sum().backward()
    thetas = [block.gates["default"].theta for block in gated_blocks(model)]
    for theta, (original, dilated, out) in zip(thetas, seen, strict=True):
        gate = theta.detach().sigmoid()
        expected = gate * (1 - gate) * (out.grad * (dilated - original)).sum()
        assert theta.grad == pytest.approx(expected.item(), rel=1e-3)

        def loss(shift: float, theta: Tensor = theta) -> float:
            with torch.no_grad():
                theta.add_(shift)
                value = arch.run(model, inputs).square().sum().item()
                theta.sub_(shift)
            return value

        assert theta.grad.item() == pytest.approx((loss(0.05) - loss(-0.05)) / 0.1, rel=1e-2)
    before = [theta.detach().clone() for theta in thetas]
    optimizer = torch.optim.SGD(thetas, lr=1.0)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        arch.run(model, inputs).square().sum().backward()
        optimizer.step()
        values.append(gate_summary(model).dilated.tolist())
    for theta, was in zip(thetas, before, strict=True):
        assert not torch.equal(theta, was)
    assert len({tuple(row) for row in values}) == 5


@pytest.mark.parametrize("gate", [FixedGate(0.5), ScalarGate(0.3), MLPGate(hidden_size=4, activation="sigmoid")])
def test_a_method_without_parameters_survives_every_pass(gate: Any, tmp_path: Path) -> None:
    arch, inputs = ARCHS["bert"], ARCHS["bert"].inputs()
    model = attached(arch, gate, [METHODS["dilated"]])
    trained = sum(p.numel() for n, p in model.named_parameters() if ".pelton." in n)
    assert trained == sum(p.numel() for block in gated_blocks(model) for p in block.gates.parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(arch.build(), tmp_path, adapter_name="other").eval()
    with torch.no_grad():
        out = arch.run(model, inputs)
        assert torch.equal(out, arch.run(again, inputs))
        assert torch.equal(out, arch.run(copy.deepcopy(model), inputs))
    names = model.get_base_model().state_dict().keys()
    with pytest.raises(AdapterError):
        model.merge_and_unload()
    frozen = freeze_gates(model, [{k: v[:1] for k, v in inputs.items()}])
    assert isinstance(frozen, FrozenGate)
    assert "dilated" in frozen.values["0"]
    gone = prune(model, keep=1)
    assert [(entry.kind, entry.parameters) for entry in gone] == [("dilated", 0)]
    assert revive(model) == ["prune", "freeze"]
    with torch.no_grad():
        assert torch.equal(out, arch.run(model, inputs))
    assert model.get_base_model().state_dict().keys() == names
    assert isinstance(model.unload(), torch.nn.Module)


def test_contributions_leave_it_out() -> None:
    from pelton.training.contributions import Contributions

    class Folder:
        written: dict[str, Any] = {}  # noqa: RUF012

        def write(self, name: str, values: Any) -> None:
            self.written[name] = values

    arch = ARCHS["bert"]
    for methods in ([METHODS["dilated"]], [LoRA(rank=2), METHODS["dilated"]]):
        model, folder = attached(arch, MLPGate(hidden_size=4), methods).train(), Folder()
        noted: Any = Contributions(folder, 2)  # type: ignore[arg-type]
        noted.on_step_begin(None, None, None, model)
        arch.run(model, arch.inputs()).square().sum().backward()
        noted.on_pre_optimizer_step(None, None, None)
        noted.on_train_end(None, None, None)
        rows = folder.written.get("contributions", {})
        assert all(list(row) == ["lora"] for row in rows.values())
        if len(methods) == 2:
            gone = prune(model, keep=1, importance=rows)
            assert all(entry.kind == "lora" for entry in gone)


def test_the_summary_shows_both_shares() -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig(methods=[METHODS["dilated"]], gate=ScalarGate(0.01)))
    table = gate_summary(model)
    assert list(table.columns) == ["index", "block", "dilated", "original", "sum", "requires_grad", "is_buffer"]
    assert table.original.tolist() == pytest.approx([0.99] * 2)
    assert table["sum"].tolist() == [1.0, 1.0]
    assert table.requires_grad.all()
    assert not table.is_buffer.any()


# ---- what is refused ---------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: DilatedAttention(segment=4, dilation=8), "`dilation <= segment` must hold, but got dilation=8, segment=4"),
    (lambda: DilatedAttention(segment=6, dilation=4), r"`segment % dilation == 0` must hold, but got segment=6"),
    (lambda: DilatedAttention(segment=(4, 8), dilation=(1, 2, 4)), r"`len\(segment\) == len\(dilation\)"),
    (lambda: DilatedAttention(segment=0), "`segment > 0` must hold, but got segment=0"),
    (lambda: DilatedAttention(segment=()), "`segment has at least one value`"),
    (lambda: DilatedAttention(dilation=1.5), "dilation"),  # type: ignore[arg-type]
    (lambda: DilatedAttention(kernel=4), "`kernel is odd` must hold, but got kernel=4"),
    (lambda: DilatedAttention(heads=()), "heads has at least one head"),
    (lambda: DilatedAttention(heads=(1, 1)), "every head is named once"),
    (lambda: DilatedAttention(space="image"), "space 'image'"),  # type: ignore[arg-type]
    (lambda: part_of(heads=(4,)), "`0 <= head < 4` must hold, but got head=4"),
    (lambda: part_of(space="grid"), "has no grid of patches"),
    (lambda: part_of(grid=Grid(4, 4), dilation=2), r"`kernel \* dilation <= 4 on a grid of 4 × 4 patches`"),
    (lambda: PeltonConfig.dilated(pretrain_dilated_ratio=1.5), "`0 <= pretrain_dilated_ratio <= 1` must hold, .*1.5"),
    (lambda: PeltonConfig.dilated(finetune_dilated_ratio=-0.1), "`0 <= finetune_dilated_ratio <= 1`"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_values_are_refused_with_the_law(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"'finetuning'.*Did you mean 'finetune'"):
        PeltonConfig.dilated(stage="finetuning")  # type: ignore[arg-type]
    model = get_peft_model(tiny(), PeltonConfig.dilated())
    with pytest.raises(UnknownName, match="Did you mean 'pretrain'"):
        set_stage(model, "pretraining")


def _mae() -> Any:
    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    return tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**VISION, **decoder, decoder_intermediate_size=16))


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (ARCHS["swin"].build, {}, "'swin' runs in windows"),
        (ARCHS["deberta-v2"].build, {}, "'deberta-v2' has none: .* outside transformers' attention interface"),
        (ARCHS["blip"].build, {}, "'blip' has none"),
        (ARCHS["bert"].build, {"space": "grid"}, "grid of patches in .* of 'bert' cannot be told"),
        (_mae, {"space": "grid"}, "of 'vit_mae' cannot be told"),
    ],
)
def test_what_cannot_be_dilated_is_refused_by_name(make: Any, spec: dict[str, Any], message: str) -> None:
    backbone = make()
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(AnatomyError, match=message):
        get_peft_model(backbone, PeltonConfig.single(DilatedAttention(**spec)))
    assert [name for name, _ in backbone.named_modules()] == names


def test_unknown_changes_of_scores_are_refused() -> None:
    config = tf.Gemma2Config(**DECODER | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4))
    backbone = tf.Gemma2ForCausalLM(config)
    backbone.set_attn_implementation("eager")
    model = get_peft_model(backbone, PeltonConfig.single(DilatedAttention()))
    with pytest.raises(AdapterError, match="Gemma2Attention attends with 'softcap'"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_masked_autoencoders_take_sequences() -> None:
    model = get_peft_model(_mae(), PeltonConfig.single(DilatedAttention(segment=4, space="sequence"))).eval()
    with torch.no_grad():
        assert torch.isfinite(model(pixel_values=torch.randn(2, 3, 16, 16)).loss)


def test_specs_survive_json() -> None:
    spec = DilatedAttention(segment=[4, 8], dilation=2, heads=[1], kernel=[3, 5], space="grid")  # type: ignore[arg-type]
    assert DilatedAttention.from_dict(spec.to_dict()) == spec
    assert spec.rates == ((4, 2), (8, 2))
