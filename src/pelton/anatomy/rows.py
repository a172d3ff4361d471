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
        fused: pattern → the sites whose projections the layer holds, in order.
        cross: names that mark cross-attention, which has no sites.
        norm: see `Block.norm`.
        causal: overrides what the attention module says of itself.
        padding: whether the attention's mask tells padding from tokens.
        grid: True where the tokens are all patches of one image, row by row, behind the others ([CLS], registers);
            False where they never are; None where it is for the user to say.
    """

    sites: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    cross: str = r"crossattention|encoder_attn|EncDecAttention|cross_attn"
    norm: str | None = None
    causal: bool | None = None
    padding: bool = True
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


def _like_default(fused: Mapping[str, tuple[str, ...]] | None = None, **sites: str) -> Row:
    renamed = {name.replace("_", ".", 1): pattern for name, pattern in sites.items()}
    return Row(sites={**DEFAULT.sites, **renamed}, fused=fused or {})


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

ROWS: dict[str, Row] = {
    "gpt2": _like_default({r"attn\.c_attn": _QKV}, attn_out=r"attn\.c_proj", ffn_out=r"mlp\.c_proj"),
    "modernbert": _like_default({r"attn\.Wqkv": _QKV}, attn_out=r"attn\.Wo", ffn_in=r"mlp\.Wi", ffn_out=r"mlp\.Wo"),
    "phi3": _like_default({r"self_attn\.qkv_proj": _QKV}),
    "blip_vision_model": _like_default({r"self_attn\.qkv": _QKV}, attn_out=r"self_attn\.projection"),
    "clip_text_model": dataclasses.replace(DEFAULT, causal=True),
    **{name: dataclasses.replace(DEFAULT, grid=True) for name in _PATCHES},
    "vit_mae": dataclasses.replace(DEFAULT, grid=False),  # its encoder sees a part of the patches, shuffled
    "swin": dataclasses.replace(DEFAULT, norm="layernorm_before", padding=False),
}
"""Rows by the `model_type` of the config that the attention module holds."""
