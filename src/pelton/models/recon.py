"""Recon: a compact Transformer for images that learns by filling in what is hidden, and then tells regions apart.

    pixels ─► patches ─► hide some ─► encoder ─► decoder ─► pixels of the hidden patches    ReconModel
                                      encoder ─► decoder ─► a class for each cell           ReconForSemanticSegmentation

A part of the patches is hidden, and the model learns to say what was there: the squared error of hidden patches, each
scaled to mean 0 and deviation 1 (masked autoencoders, He et al. 2021, arXiv 2111.06377, section 3). Unlike there, the
encoder sees a learned token in place of each hidden patch (SimMIM, Xie et al. 2021, arXiv 2111.09886, section 3.1;
BEiT, 2106.08254): all patches keep their place on the grid, in pretraining as in fine-tuning, which attention that
reads places off the grid needs. The decoder is kept for segmentation: it has learned to lay out an image.

Positions are sines and cosines of row and column, computed when they are needed, so that images of any size will do
whose sides the patch size divides.

The config also says how much of each block's attention is to be *dilated* (`use_dilated` and the ratios). The model
computes its own attention only: what stands beside it is attached, as to any model, by
`get_peft_model(model, PeltonConfig.from_backbone(model.config))`.

Letters: B images, C channels, Y × X pixels, P patch size, N = rows × columns patches, D hidden, H heads, K head dim,
L classes, S cells a side of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from pelton.models.recon_config import ReconConfig
from pelton.models.recon_layers import (
    Attention,
    Decoder,
    DecoderLayer,
    Embeddings,
    EncoderLayer,
    grid_of,
    hide,
    patchify,
)

TINY = 1e-6


class ReconPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the models share: how they load, and what transformers may do with them."""

    config_class = ReconConfig
    base_model_prefix = "recon"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = [EncoderLayer.__name__, DecoderLayer.__name__]  # noqa: RUF012 - transformers' own form
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": Attention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        """Draws first weights: linear maps, of patches too, by Xavier (He et al. 2021, appendix A.1).

        A deviation that does not depend on the width would leave narrow models with positions and little else.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
        if isinstance(module, Embeddings):
            weight = module.patch_embeddings.weight
            if not getattr(weight, "_is_hf_initialized", False):  # a view does not know that it was loaded
                initialization.xavier_uniform_(weight.flatten(1))
            initialization.normal_(module.mask_token, std=self.config.initializer_range)


@dataclass
class BackboneOutput(ModelOutput):  # type: ignore[misc]
    """What encoder and decoder give.

    Attributes:
        last_hidden_state: [B, N, D] of the encoder.
        decoded: [B, N, D of the decoder].
        hidden_states: The encoder's, where they are asked for.
        attentions: Of encoder and decoder, likewise.
    """

    last_hidden_state: Tensor | None = None
    decoded: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ReconBackbone(ReconPreTrainedModel):
    """Encoder and decoder, without a head."""

    def __init__(self, config: ReconConfig) -> None:
        """Makes both."""
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = Decoder(config)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, mask: Tensor | None = None, **kwargs: Any) -> BackboneOutput:
        """Encodes and decodes images; takes what `Embeddings` takes, and what goes to the attention function."""
        x = self.embeddings(pixel_values, mask)
        for layer in self.layers:
            x = layer(x, None, **kwargs)
        x = self.norm(x)
        rows, columns = grid_of(pixel_values, self.config.patch_size)
        return BackboneOutput(last_hidden_state=x, decoded=self.decoder(x, rows, columns, **kwargs))


@dataclass
class ReconOutput(ModelOutput):  # type: ignore[misc]
    """What `ReconModel` says.

    Attributes:
        loss: Mean squared error of the hidden patches' pixels; None where nothing is hidden.
        logits: [B, N, P · P · C], each patch's pixels, scaled as in the loss.
        mask: [B, N], 1 for hidden patches.
        last_hidden_state: [B, N, D] of the encoder.
        hidden_states: The encoder's, where they are asked for.
        attentions: Likewise.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ReconModel(ReconPreTrainedModel):
    """Says what hidden patches show: a masked autoencoder that keeps all patches in their places."""

    def __init__(self, config: ReconConfig) -> None:
        """Makes encoder, decoder and what reads pixels off it."""
        super().__init__(config)
        self.recon = ReconBackbone(config)
        self.predictor = nn.Linear(config.decoder_hidden_size, config.patch_size**2 * config.num_channels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, **kwargs: Any) -> ReconOutput:
        """Reconstructs images.

        Args:
            pixel_values: [B, C, Y, X].
            noise: [B, N]; the `mask_ratio` of an image's patches with the highest values are hidden. When not given
                it is drawn in training, and nothing is hidden in evaluation.
            **kwargs: Go to the attention function, or ask for hidden states and attentions.
        """
        rows, columns = grid_of(pixel_values, self.config.patch_size)
        if noise is None and self.training:
            noise = torch.rand(pixel_values.shape[0], rows * columns, device=pixel_values.device)
        mask = None if noise is None else hide(noise, self.config.mask_ratio)
        found = self.recon(pixel_values, mask, **kwargs)
        logits = self.predictor(found.decoded)
        loss = None if mask is None else self._loss(logits, pixel_values, mask)
        return ReconOutput(
            loss=loss,
            logits=logits,
            mask=torch.zeros_like(logits[..., 0]) if mask is None else mask.to(logits.dtype),
            last_hidden_state=found.last_hidden_state,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def _loss(self, logits: Tensor, pixel_values: Tensor, mask: Tensor) -> Tensor:
        target = patchify(pixel_values.float(), self.config.patch_size)
        if self.config.norm_pix_loss:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + TINY).sqrt()
        error = (logits.float() - target).square().mean(dim=-1)  # [B, N]
        return (error * mask).sum() / mask.sum()


class ReconForSemanticSegmentation(ReconPreTrainedModel):
    """Says of each cell of each patch which class it shows."""

    def __init__(self, config: ReconConfig) -> None:
        """Makes encoder, decoder and classifier; the config's `task_type` becomes "finetune"."""
        config.task_type = "finetune"
        super().__init__(config)
        self.recon = ReconBackbone(config)
        self.classifier = nn.Linear(config.decoder_hidden_size, config.cells**2 * config.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Classifies pixels.

        Args:
            pixel_values: [B, C, Y, X].
            labels: [B, Y', X'] classes, or `semantic_loss_ignore_index`; logits are interpolated to that size.
            **kwargs: Go to the attention function, or ask for hidden states and attentions.

        Returns:
            `logits` [B, L, rows · S, columns · S], and the mean cross-entropy where there are labels.
        """
        rows, columns = grid_of(pixel_values, self.config.patch_size)
        found = self.recon(pixel_values, None, **kwargs)
        cells = self.classifier(found.decoded)  # [B, N, L · S · S]
        logits = F.pixel_shuffle(cells.transpose(1, 2).reshape(cells.shape[0], -1, rows, columns), self.config.cells)
        loss = None
        if labels is not None:
            wide = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            ignored = self.config.semantic_loss_ignore_index
            total = F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum")
            loss = total / (labels != ignored).sum().clamp_min(1)  # a batch may have no labelled pixel
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )


AutoConfig.register(ReconConfig.model_type, ReconConfig, exist_ok=True)
AutoModel.register(ReconConfig, ReconModel)
AutoModelForPreTraining.register(ReconConfig, ReconModel)
AutoModelForSemanticSegmentation.register(ReconConfig, ReconForSemanticSegmentation)
