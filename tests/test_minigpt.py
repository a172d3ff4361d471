"""MiniGPT: every claim of docs/transformer-from-scratch.md, and the contracts of transformers that it keeps."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F

import pelton
from law import far
from pelton import PeltonConfig
from pelton.errors import SpecError
from pelton.models.minigpt import (
    MiniGPTAttention,
    MiniGPTBlock,
    MiniGPTConfig,
    MiniGPTForCausalLM,
    MiniGPTModel,
    eager_attention_forward,
)
from pelton.models.minigpt_config import POSITIONS
from pelton.models.positions import alibi, rotate, rotation, sinusoids

SMALL: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16
)
CPU = torch.device("cpu")


def small(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = MiniGPTForCausalLM(MiniGPTConfig(**(SMALL | more))).eval()
    with torch.no_grad():  # far from zero, so that positions and heads make a difference
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.3 if "embed" not in name else 1.0)
    return model


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(1, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


# Positions


def test_a_shift_of_sinusoids_is_a_linear_map_that_does_not_depend_on_where() -> None:
    size, shift = 16, 7
    sin, cos = sinusoids(torch.tensor([[shift]]), size, 10000.0)[0, 0].view(-1, 2).unbind(1)
    turn = torch.block_diag(*(torch.tensor([[c, s], [-s, c]]) for s, c in zip(sin.tolist(), cos.tolist(), strict=True)))
    before, after = (sinusoids(torch.arange(200)[None] + k, size, 10000.0)[0] for k in (0, shift))
    assert far(before @ turn.T, after) <= 1e-4
    assert far(turn @ turn.T, torch.eye(size)) <= 1e-6  # a rotation


def test_sinusoids_are_the_papers() -> None:
    size, place = 8, 3
    expected = [f(place / 10000 ** (2 * i / size)) for i in range(size // 2) for f in (math.sin, math.cos)]
    assert far(sinusoids(torch.tensor([[place]]), size, 10000.0)[0, 0], torch.tensor(expected)) <= 1e-6


def test_rotary_scores_depend_on_the_difference_of_positions_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def score(p: int, s: int) -> Tensor:
        turned = [rotate(x, *rotation(torch.tensor([[at]]), 8, 10000.0)) for x, at in ((q, p), (k, s))]
        return (turned[0] * turned[1]).sum()

    assert far(score(5, 2), score(105, 102)) <= 1e-4
    assert far(score(5, 2), score(5, 3)) > 1e-2
    assert far(rotate(q, *rotation(torch.tensor([[9]]), 8, 10000.0)).norm(), q.norm()) <= 1e-6  # lengths stay


@pytest.mark.parametrize("positions", POSITIONS)
def test_where_a_text_stands_matters_to_absolute_positions_only(positions: str) -> None:
    model, ids = small(positions=positions), tokens(length=5)
    with torch.no_grad():
        here, there = (model(ids, position_ids=torch.arange(5)[None] + k).logits for k in (0, 6))
    assert (far(here, there) <= 1e-4) == (positions in ("rotary", "alibi"))


def test_alibi_penalises_distance_by_a_slope_for_each_head() -> None:
    bias = alibi(3, 5, 2, 8, CPU)  # three queries behind two keys of a cache
    assert bias.shape == (1, 8, 3, 5)
    assert bias[0, 0].tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0], [-1.5, -1.0, -0.5, 0.0, 0.5], [-2, -1.5, -1, -0.5, 0]]
    assert far(bias[0, :, 0, 1], -torch.tensor([2.0**-h for h in range(1, 9)])) == 0


def test_without_positions_the_past_is_a_set() -> None:
    torch.manual_seed(0)
    attention = MiniGPTAttention(small().config, 0).eval()
    attention.config._attn_implementation = "sdpa"
    x, order = torch.randn(1, 6, 32), torch.tensor([3, 1, 4, 0, 2, 5])
    turns = rotation(torch.arange(6)[None], 8, 10000.0)
    with torch.no_grad():
        same, other = attention(x)[0], attention(x[:, order])[0]
        assert far(same[:, -1], other[:, -1]) <= 1e-6
        assert far(attention(x, turns=turns)[0][:, -1], attention(x[:, order], turns=turns)[0][:, -1]) > 1e-3


@pytest.mark.parametrize("positions", [p for p in POSITIONS if p != "learned"])
def test_computed_positions_go_on_past_the_trained_length(positions: str) -> None:
    model, ids = small(positions=positions), tokens(length=40)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.isfinite().all()
        assert far(model(ids[:, :10]).logits, logits[:, :10]) <= 1e-5
        assert model.generate(ids[:, :14], max_new_tokens=8, do_sample=False).shape == (2, 22)


LAW = r"`length <= max_position_embeddings` must hold .* \(length=17, max_position_embeddings=16\)"


def test_learned_positions_refuse_what_they_have_not_learned() -> None:
    model = small(positions="learned")
    with torch.no_grad():
        assert model(tokens(length=16)).logits.isfinite().all()
        with pytest.raises(SpecError, match=LAW):
            model(tokens(length=17))
        with pytest.raises(SpecError, match=LAW):
            model.generate(tokens(length=14), max_new_tokens=8, do_sample=False)
        static = tf.StaticCache(config=model.config, max_cache_len=20)
        model(tokens(length=16), past_key_values=static)
        with pytest.raises(SpecError, match=LAW):
            model(tokens(length=1), past_key_values=static)


def test_a_compiled_model_refuses_likewise() -> None:
    torch._dynamo.reset()
    model = small(positions="learned")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert far(compiled(tokens(length=16)).logits, model(tokens(length=16)).logits) <= 1e-5
        with pytest.raises(SpecError, match=LAW):
            compiled(tokens(length=17))
    torch._dynamo.reset()


# Attention


@pytest.mark.parametrize("width", [16, 256])
def test_scaling_keeps_the_variance_of_scores_at_one(width: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4, 8, 64, width, generator=g) for _ in range(2))
    products = q @ k.transpose(2, 3)
    assert abs(products.var() / width - 1) < 0.1
    assert abs((products * width**-0.5).var() - 1) < 0.1
    attention = MiniGPTAttention(MiniGPTConfig(hidden_size=2 * width, num_attention_heads=2), 0)
    assert attention.scaling == width**-0.5


def test_no_token_looks_ahead_and_weights_sum_to_one() -> None:
    model = small()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens(), output_attentions=True).attentions
    assert len(weights) == 2
    for one in weights:
        assert one.shape == (2, 4, 9, 9)
        assert far(one.sum(-1), torch.ones(2, 4, 9)) <= 1e-5
        ahead = torch.ones(9, 9).triu(1).bool()
        assert one[..., ahead].max() == 0
        assert one[..., ~ahead].min() > 0


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_eager_and_sdpa_agree(positions: str, norm: str) -> None:
    model, ids = small(positions=positions, norm=norm), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        sdpa = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        assert far((model(ids, attention_mask=mask).logits - sdpa) * mask[..., None], torch.zeros(())) <= 1e-4


def test_heads_do_not_see_each_other() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 5, 8, generator=g) for _ in range(3))
    module = torch.nn.Identity().eval()
    whole, _ = eager_attention_forward(module, q, k, v, None, scaling=8**-0.5)
    alone, _ = eager_attention_forward(module, q[:, 2:3], k[:, 2:3], v[:, 2:3], None, scaling=8**-0.5)
    assert far(whole[:, :, 2], alone[:, :, 0]) <= 1e-6


# Norms, initialisation, tying, loss


def test_a_pre_norm_block_that_adds_nothing_is_the_identity() -> None:
    x = torch.randn(2, 5, 32)
    for norm in ("pre", "post"):
        block = MiniGPTBlock(MiniGPTConfig(**SMALL, norm=norm), 0)
        block.self_attn.config._attn_implementation = "sdpa"
        for layer in (block.self_attn.o_proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        with torch.no_grad():
            assert (far(block(x), x) == 0) == (norm == "pre")


def test_what_deep_models_add_to_the_stream_starts_small() -> None:
    """Weights that add to the stream are smaller by √2L: what they add together is then the same at every depth."""
    growth = {}
    for scaled in (True, False):
        added = []
        for depth in (2, 32):
            torch.manual_seed(0)
            model = MiniGPTModel(MiniGPTConfig(**(SMALL | dict(num_hidden_layers=depth, hidden_size=128)))).eval()
            for block in model.layers:
                assert abs(block.mlp.fc1.weight.std() / 0.02 - 1) < 0.05
                for layer in (block.self_attn.o_proj, block.mlp.fc2):
                    assert abs(layer.weight.std() * math.sqrt(2 * depth) / 0.02 - 1) < 0.05
                    layer.weight.data *= 1 if scaled else math.sqrt(2 * depth)
            model.norm = torch.nn.Identity()
            with torch.no_grad():
                added.append((model(tokens()).last_hidden_state - model.embed_tokens(tokens())).std())
        growth[scaled] = added[1] / added[0]
    assert growth[True] < 1.5 < 3 < growth[False]


@pytest.mark.parametrize("positions", POSITIONS)
def test_parameters_are_as_many_as_the_formula_says(positions: str) -> None:
    V, D, L, N = (SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"))
    expected = V * D + L * (12 * D * D + 13 * D) + 2 * D + (N * D if positions == "learned" else 0)
    tied = MiniGPTForCausalLM(MiniGPTConfig(**SMALL, positions=positions))
    assert sum(p.numel() for p in tied.parameters()) == expected
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = MiniGPTForCausalLM(MiniGPTConfig(**SMALL, positions=positions, tie_word_embeddings=False))
    assert sum(p.numel() for p in untied.parameters()) == expected + V * D


def test_the_loss_is_the_cross_entropy_of_each_next_token() -> None:
    model, ids = small(), tokens()
    with torch.no_grad():
        out = model(ids, labels=ids)
    assert far(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) <= 1e-6
    fresh = MiniGPTForCausalLM(MiniGPTConfig(**SMALL)).eval()
    assert abs(fresh(ids, labels=ids).loss.item() - math.log(SMALL["vocab_size"])) < 0.2  # nothing is known yet


def test_logits_are_computed_for_the_places_that_are_asked_for() -> None:
    model, ids = small(), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        assert far(model(ids, logits_to_keep=2).logits, whole[:, -2:]) <= 1e-6
        assert far(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]]) <= 1e-6


def test_dropout_acts_in_training_only() -> None:
    model, ids = small(dropout=0.5, attention_dropout=0.5), tokens()
    assert far(model(ids).logits, model(ids).logits) == 0
    model.train()
    assert far(model(ids).logits, model(ids).logits) > 1e-3


# The same as GPT-2


def as_gpt2(model: Any) -> Any:
    """The same weights in transformers' GPT-2."""
    config, own = model.config, model.model
    twin = tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_positions=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            activation_function=config.activation,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    there = twin.transformer
    with torch.no_grad():
        there.wte.weight.copy_(own.embed_tokens.weight)
        there.wpe.weight.copy_(own.embed_positions.weight)
        there.ln_f.load_state_dict(own.norm.state_dict())
        for mine, theirs in zip(own.layers, there.h, strict=True):
            theirs.ln_1.load_state_dict(mine.norm1.state_dict())
            theirs.ln_2.load_state_dict(mine.norm2.state_dict())
            qkv = [getattr(mine.self_attn, f"{name}_proj") for name in "qkv"]
            theirs.attn.c_attn.weight.copy_(torch.cat([layer.weight for layer in qkv]).T)
            theirs.attn.c_attn.bias.copy_(torch.cat([layer.bias for layer in qkv]))
            pairs = (
                (mine.self_attn.o_proj, theirs.attn.c_proj),
                (mine.mlp.fc1, theirs.mlp.c_fc),
                (mine.mlp.fc2, theirs.mlp.c_proj),
            )
            for layer, conv in pairs:
                conv.weight.copy_(layer.weight.T)
                conv.bias.copy_(layer.bias)
    return twin


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_logits_are_gpt2s_with_the_same_weights(activation: str) -> None:
    model = small(positions="learned", activation=activation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    twin, ids = as_gpt2(model), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        assert far(model(ids).logits, twin(ids).logits) <= 1e-5
        mine = model(ids, attention_mask=mask).logits  # counts positions from the first token by itself
        theirs = twin(ids, attention_mask=mask, position_ids=places).logits
        assert far(mine * mask[..., None], theirs * mask[..., None]) <= 1e-5
        said, expected = (m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, twin))
    assert torch.equal(said, expected)
    loss, other = model(ids, labels=ids).loss, twin(ids, labels=ids).loss
    loss.backward()
    other.backward()
    grad = twin.transformer.wte.weight.grad
    assert grad is not None
    assert far(model.lm_head.weight.grad, grad) <= 1e-5


# Cache and padding


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("static", [False, True])
def test_what_is_cached_need_not_be_computed_again(positions: str, static: bool) -> None:
    model, ids = small(positions=positions), tokens(length=12)
    cache = tf.StaticCache(config=model.config, max_cache_len=16) if static else tf.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = [model(ids[:, at], past_key_values=cache, use_cache=True).logits for at in _parts()]
    assert far(torch.cat(parts, 1), whole) <= 1e-5


def _parts() -> list[slice]:
    """Five tokens, then one, then several at once."""
    return [slice(0, 5), slice(5, 6), slice(6, 10), slice(10, 12)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_on_either_side(positions: str, side: str) -> None:
    model, ids = small(positions=positions), tokens(rows=1, length=6)
    pad = (4, 0) if side == "left" else (0, 4)
    real = slice(4, None) if side == "left" else slice(0, 6)
    with torch.no_grad():
        padded = model(F.pad(ids, pad, value=3), attention_mask=F.pad(torch.ones_like(ids), pad)).logits
        assert far(padded[:, real], model(ids).logits) <= 1e-5


@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padded_rows_generate_what_they_do_alone(positions: str) -> None:
    model, ids = small(positions=positions), tokens(rows=1, length=6)
    batch, mask = torch.cat([F.pad(ids, (3, 0)), tokens(1, 9, 5)]), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        alone, together = model.generate(ids, **options), model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(alone[0, 6:], together[0, 9:])


# Contracts


@pytest.mark.parametrize("positions", POSITIONS)
def test_checkpointed_gradients_equal_plain_ones(positions: str) -> None:
    grads = []
    for checkpoint in (False, True):
        model = small(positions=positions).train()
        if checkpoint:
            model.activation_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_saved_model_is_loaded_by_the_auto_classes_in_a_fresh_process(tmp_path: Path) -> None:
    model = small(positions="alibi", norm="post", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    torch.save(model(tokens()).logits, tmp_path / "logits.pt")
    script = f"""
import pelton, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
assert type(model).__module__ == "pelton.models.minigpt"
ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
assert torch.equal(model(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert AutoConfig.from_pretrained({str(tmp_path)!r}).norm == "post"
assert type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__ == "MiniGPTModel"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_blocks_and_sites_are_found_by_their_names() -> None:
    anatomy = pelton.find_anatomy(small())
    assert len(anatomy.blocks) == 2
    for block in anatomy.blocks:
        assert set(block.sites) == {"attn.q", "attn.k", "attn.v", "attn.out", "ffn.in", "ffn.out", "attn"}
        assert (block.causal, block.heads, block.head_dim, block.missing) == (True, 4, 8, {})


def test_the_default_adapter_learns_on_it_and_folds() -> None:
    model = get_peft_model(small(), PeltonConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    pelton.freeze_gates(model, [{"input_ids": tokens()}])
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
        plain: Any = pelton.fold(model)
        assert far(plain(input_ids=tokens()).logits, before) <= 1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(positions="rotery"), r"Unknown positions 'rotery'. Did you mean 'rotary'\?"),
        (dict(norm="both"), "Unknown norm 'both'"),
        (dict(hidden_size=30), r"`hidden_size % num_attention_heads == 0` must hold.*hidden_size=30"),
        (dict(hidden_size=12), r"even number of features per head.*hidden_size=12, num_attention_heads=4"),
    ],
)
def test_choices_and_sizes_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MiniGPTConfig(**(SMALL | values))


def test_either_ids_or_embeddings_are_given() -> None:
    model = small()
    with pytest.raises(SpecError, match="Exactly one of `input_ids` and `inputs_embeds`"):
        model()
    with torch.no_grad():
        assert far(model(inputs_embeds=model.model.embed_tokens(tokens())).logits, model(tokens()).logits) == 0


def test_the_document_names_tests_that_exist() -> None:
    folder = Path(__file__).parent
    text = (folder.parent / "docs" / "transformer-from-scratch.md").read_text(encoding="utf-8")
    there = {
        name for path in folder.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert named <= there
