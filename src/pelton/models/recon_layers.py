"""What Recon is built of: attention, the blocks of encoder and decoder, patches and their positions.

Every block is x + Attention(norm(x)), then x + MLP(norm(x)). Attention goes through transformers' attention interface.

Letters: B images, C channels, Y × X pixels, P patch size, N = rows × columns patches, D hidden, H heads, K head dim,
L classes, S cells a side of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pelton.models.recon_config import ReconConfig

PERIOD = 50.0
"""Of the slowest wave, in patches, over 2π: grids are tens of patches wide, and the 10,000 of texts tells few apart."""


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Computes softmax(Q Kᵀ · scaling) V step by step; returns it as [B, T, H, K], and the weights [B, H, T, T].

    Args:
        module: The attention it is for.
        query: [B, H, T, K].
        key: [B, H, T, K].
        value: [B, H, T, K].
        attention_mask: Added to the scores; None where every patch sees every patch.
        scaling: Of the scores.
        dropout: Of the weights.
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.float().softmax(dim=-1).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Multi-head self-attention: every patch looks at every patch."""

    def __init__(self, config: ReconConfig, hidden_size: int, heads: int) -> None:
        """Makes the four projections of D features."""
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Returns what each patch gathers, [B, N, D], and the weights where the implementation gives them.

        Args:
            x: [B, N, D].
            attention_mask: Added to the scores.
            **kwargs: Go to the attention function.
        """
        batch, patches, _ = x.shape
        query, key, value = (
            project(x).view(batch, patches, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, N, K] each
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        out, weights = function(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(batch, patches, -1)), weights


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ReconConfig, hidden_size: int, intermediate_size: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, N, D]."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Layer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One block: attention, then an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ReconConfig, hidden_size: int, heads: int, intermediate_size: int) -> None:
        """Makes the block for D = `hidden_size`."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, hidden_size, heads)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, hidden_size, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps [B, N, D] to [B, N, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), attention_mask, **kwargs)[0])
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class EncoderLayer(Layer):
    """A block at the encoder's width."""

    def __init__(self, config: ReconConfig) -> None:
        """Takes its sizes from the config."""
        super().__init__(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)


class DecoderLayer(Layer):
    """A block at the decoder's width."""

    def __init__(self, config: ReconConfig) -> None:
        """Takes its sizes from the config."""
        super().__init__(
            config, config.decoder_hidden_size, config.decoder_num_attention_heads, config.decoder_intermediate_size
        )


class Embeddings(nn.Module):
    """Patches become tokens; hidden ones become one learned token; all get their positions."""

    def __init__(self, config: ReconConfig) -> None:
        """Makes the projection and the token."""
        super().__init__()
        size = config.patch_size
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns tokens [B, N, D], row by row.

        Args:
            pixel_values: [B, C, Y, X].
            mask: [B, N], True for hidden patches; None where nothing is hidden.
        """
        rows, columns = grid_of(pixel_values, self.patch_embeddings.kernel_size[0])
        x = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        out: Tensor = x + positions(rows, columns, x)
        return out


class Decoder(nn.Module):
    """The encoder's tokens through narrower blocks."""

    def __init__(self, config: ReconConfig) -> None:
        """Makes the decoder."""
        super().__init__()
        self.embed = nn.Linear(config.hidden_size, config.decoder_hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.decoder_num_hidden_layers)])
        self.norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, rows: int, columns: int, **kwargs: Any) -> Tensor:
        """Maps the encoder's [B, N, D] to [B, N, D of the decoder]."""
        x = self.embed(x)
        x = x + positions(rows, columns, x)
        for layer in self.layers:
            x = layer(x, None, **kwargs)
        return self.norm(x)  # type: ignore[no-any-return]


def positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns sines and cosines of rows and of columns, a quarter of D each: [N, D], for tokens `like` [B, N, D]."""
    quarter = like.shape[-1] // 4
    frequencies = PERIOD ** -(torch.arange(quarter, device=like.device) / quarter)  # [D / 4]
    down = torch.arange(rows, device=like.device)[:, None] * frequencies  # [rows, D / 4]
    across = torch.arange(columns, device=like.device)[:, None] * frequencies
    down, across = down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)
    table = torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], dim=-1)
    return table.flatten(0, 1).to(like.dtype)


def grid_of(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """Returns the rows and columns of patches in images [B, C, Y, X].

    Raises:
        ValueError: the patch size does not divide a side.
    """
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"Images of {height} × {width} pixels are no whole number of patches: expected multiples of {patch_size}. "
            "Resize the images."
        )
    return height // patch_size, width // patch_size


def hide(noise: Tensor, ratio: float) -> Tensor:
    """Returns which patches are hidden, [B, N]: all but the int(N · (1 − ratio)) with the lowest noise [B, N]."""
    kept = int(noise.shape[1] * (1 - ratio))
    return noise.argsort(dim=1).argsort(dim=1) >= kept


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images [B, C, Y, X] into patches [B, N, P · P · C], row by row, channels last."""
    rows, columns = grid_of(images, patch_size)
    cut = images.reshape(images.shape[0], -1, rows, patch_size, columns, patch_size)  # [B, C, rows, P, columns, P]
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(images.shape[0], rows * columns, -1)
