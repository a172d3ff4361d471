"""How architectures name their parts: one default row that covers most, and a row for each that differs.

A pattern is matched against the whole name of a module inside its block. A fused layer is a linear layer whose output
holds several projections one after the other. To add an architecture, print `pelton anatomy MODEL`; where a site is
missing or wrong, add a row under the `model_type` of the config that its attention holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_IN_ATTENTION = r"(?:.*\.)?"


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        sites: pattern by site.
        fused: pattern → the sites whose projections the layer holds, in order; none where heads take turns, so that a
            projection is no slice.
        cross: names that mark cross-attention, which has no sites.
        norm: see `Block.norm`.
        causal: overrides what the attention module says of itself.
        padding: whether there is padding that the attention's mask tells from tokens; None where there is some, but the
            mask has a form of its own.
        refused: pattern of the attention's class → why nothing can be attached to its blocks.
        static: pattern of the attention's class → why gates there cannot read the input.
        grid: True where the tokens are all patches of one image, row by row, behind the others ([CLS], registers);
            False where they never are; None where it is for the user to say.
    """

    sites: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    cross: str = r"cross_?attention|encoder_attn|EncDecAttention|cross_attn"
    norm: str | None = None
    causal: bool | None = None
    padding: bool | None = True
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    static: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: bool | None = None


DEFAULT = Row(
    sites={
        "attn.q": _IN_ATTENTION + r"(query|q_proj|q_lin|query_proj|q)",
        "attn.k": _IN_ATTENTION + r"(key|k_proj|k_lin|key_proj|k)",
        "attn.v": _IN_ATTENTION + r"(value|v_proj|v_lin|value_proj|v)",
        "attn.out": _IN_ATTENTION
        + r"(o_proj|out_proj|out_lin|SelfAttention\.o|attention\.output\.dense|attention\.dense)",
        "ffn.in": r"(.*\.)?(intermediate\.dense|fc1|lin1|wi|wi_0|wi_1|gate_proj|up_proj|gate_up_proj|c_fc|ffn)",
        "ffn.out": r"(?!attention\.)(.*\.)?(output\.dense|fc2|lin2|wo|down_proj|ffn_output)",
    }
)

_QKV = ("attn.q", "attn.k", "attn.v")


_NEOX = {"ffn_in": r"mlp\.dense_h_to_4h", "ffn_out": r"mlp\.dense_4h_to_h"}


def _like_default(fused: Mapping[str, tuple[str, ...]] | None = None, **sites: str) -> Row:
    renamed = {name.replace("_", ".", 1): pattern for name, pattern in sites.items()}
    return Row(sites={**DEFAULT.sites, **renamed}, fused=fused or {})


def _refused(reason: str, attention: str = "") -> Row:
    return dataclasses.replace(DEFAULT, refused={attention: reason})


def _static(reason: str, attention: str = "", padding: bool | None = True) -> Row:
    return dataclasses.replace(DEFAULT, static={attention: reason}, padding=padding)


_PATCHES = (
    "beit",
    "clip_vision_model",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "recon",
    "siglip_vision_model",
    "vit",
    "vit_msn",
)

_CAUSAL_TEXT = (
    "aimv2_text_model",
    "clip_text_model",
    "clipseg_text_model",
    "groupvit_text_model",
    "metaclip_2_text_model",
    "owlv2_text_model",
    "owlvit_text_model",
    "xclip_text_model",
)
"""They attend to what came before, while their attention says otherwise."""

ROWS: dict[str, Row] = {
    "gpt2": _like_default({r"attn\.c_attn": _QKV}, attn_out=r"attn\.c_proj", ffn_out=r"mlp\.c_proj"),
    "modernbert": _like_default({r"attn\.Wqkv": _QKV}, attn_out=r"attn\.Wo", ffn_in=r"mlp\.Wi", ffn_out=r"mlp\.Wo"),
    "phi3": _like_default({r"self_attn\.qkv_proj": _QKV}),
    "blip_vision_model": _like_default({r"self_attn\.qkv": _QKV}, attn_out=r"self_attn\.projection"),
    "openai-gpt": dataclasses.replace(
        _like_default({r"attn\.c_attn": _QKV}, attn_out=r"attn\.c_proj", ffn_out=r"mlp\.c_proj"), causal=True
    ),
    "gpt_bigcode": _like_default({r"attn\.c_attn": ()}, attn_out=r"attn\.c_proj", ffn_out=r"mlp\.c_proj"),
    "gpt_neo": _like_default(ffn_out=r"mlp\.c_proj"),
    "starcoder2": _like_default(ffn_out=r"mlp\.c_proj"),
    "gptj": _like_default(ffn_in=r"mlp\.fc_in", ffn_out=r"mlp\.fc_out"),
    "codegen": _like_default({r"attn\.qkv_proj": ()}, ffn_in=r"mlp\.fc_in", ffn_out=r"mlp\.fc_out"),
    "gpt_neox": _like_default({r"attention\.query_key_value": ()}, attn_out=r"attention\.dense", **_NEOX),
    "bloom": _like_default({r"self_attention\.query_key_value": ()}, attn_out=r"self_attention\.dense", **_NEOX),
    "falcon": _like_default({r"self_attention\.query_key_value": ()}, attn_out=r"self_attention\.dense", **_NEOX),
    "persimmon": _like_default({r"self_attn\.query_key_value": ()}, attn_out=r"self_attn\.dense", **_NEOX),
    "phi": _like_default(attn_out=r"self_attn\.dense"),
    "mpt": _like_default({r"attn\.Wqkv": _QKV}),
    "ctrl": _like_default(
        attn_q=r"multi_head_attention\.Wq",
        attn_k=r"multi_head_attention\.Wk",
        attn_v=r"multi_head_attention\.Wv",
        attn_out=r"multi_head_attention\.dense",
        ffn_in=r"ffn\.0",
        ffn_out=r"ffn\.2",
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _like_default(attn_q=r"self_attn\.(q_proj|q_b_proj)")),
    "deberta": _like_default({r"(attention\.)?self\.in_proj": ()}),
    "mobilebert": _like_default(attn_out=r"attention\.output\.dense"),
    **dict.fromkeys(_CAUSAL_TEXT, dataclasses.replace(DEFAULT, causal=True)),
    **dict.fromkeys(
        ("canine", "luke", "lxmert"),
        _static("its layers see other tokens than its attention's input has", padding=None),
    ),
    "longt5": _static("its layers see global tokens beside the others", "TransientGlobal", padding=None),
    "pegasus_x": _static("its layers see global tokens beside the others", "GlobalLocal", padding=None),
    **dict.fromkeys(("longformer", "led", "fsmt"), _static("its layers see tokens before examples, [T, B, D]")),
    **dict.fromkeys(
        ("big_bird", "bigbird_pegasus"),
        _refused(
            "it changes places with another while it runs. Load the model with attention_type='original_full'",
            "BlockSparse",
        ),
    ),
    "prophetnet": _refused("its decoder runs several streams through each layer"),
    "ibert": _refused("its layers give integers and their scale"),
    **{name: dataclasses.replace(DEFAULT, grid=True) for name in _PATCHES},
    "vit_mae": dataclasses.replace(DEFAULT, grid=False),  # its encoder sees a part of the patches, shuffled
    "swin": dataclasses.replace(DEFAULT, norm="layernorm_before", padding=False),
}
"""Rows by the `model_type` of the config that the attention module holds."""
