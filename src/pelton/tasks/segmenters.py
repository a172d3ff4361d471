"""A segmentation head for any encoder of patches, and the choice between it and the heads of transformers.

Shapes: B batch, C channels, Y × X pixels, T tokens, D hidden, L classes, S cells a side of a patch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

CELLS = 4
LOADING = ("dtype", "output_loading_info", "ignore_mismatched_sizes", "attn_implementation")
"""What `from_pretrained` takes beside values of the config."""
ENCODERS: dict[str, type[PreTrainedConfig]] = {"vit_mae": ViTConfig}
"""Types that hide patches while they learn → the config of what they are when they see all."""


class Segmenter:
    """Loads the segmentation model of transformers for a backbone, or `PatchSegmenter` where there is none."""

    @staticmethod
    def from_pretrained(folder: Any, **options: Any) -> Any:
        """Loads as transformers' classes do."""
        known = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
        return (AutoModelForSemanticSegmentation if known else PatchSegmenter).from_pretrained(folder, **options)

    @staticmethod
    def from_config(config: PreTrainedConfig, **options: Any) -> Any:
        """Makes random weights as transformers' classes do."""
        if type(config) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
            return AutoModelForSemanticSegmentation.from_config(config, **options)
        config = seeing_all(config)
        return PatchSegmenter(config, AutoModel.from_config(config, **options))


class PatchSegmenter(PreTrainedModel):  # type: ignore[misc]
    """Any `AutoModel` whose tokens are patches, under two convolutions.

    Saves and loads as transformers' own models do: the encoder's weights are under `backbone.`.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Whatever the encoder supports has been settled by the time it is wrapped.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, backbone: PreTrainedModel | None = None) -> None:
        """Wraps `backbone`, or a new one made from `config` (its weights are then loaded by `from_pretrained`)."""
        backbone = AutoModel.from_config(config) if backbone is None else backbone
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # patches are what is read
        super().__init__(config)
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.hidden_size, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(config.hidden_size, config.num_labels * CELLS**2, kernel_size=1),
            nn.PixelShuffle(CELLS),
        ).to(backbone.dtype)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *arguments: Any, **options: Any) -> Any:
        """Loads what `save_pretrained` wrote, or an encoder under a new head.

        Returns:
            The model; with `output_loading_info` also transformers' report, in the names of this model.
        """
        loading = {key: options.pop(key) for key in LOADING if key in options}
        config = seeing_all(AutoConfig.from_pretrained(folder, **options))
        if cls.__name__ in (config.architectures or ()):
            return super().from_pretrained(folder, *arguments, config=config, **loading)
        informed = loading.pop("output_loading_info", False)
        backbone, report = AutoModel.from_pretrained(folder, config=config, output_loading_info=True, **loading)
        model = cls(backbone.config, backbone)
        if not informed:
            return model
        prefix, new = f"{cls.base_model_prefix}.", [name for name, _ in model.named_parameters() if "head." in name]
        missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        report["missing_keys"] = {*(prefix + key for key in missing), *new}
        report["mismatched_keys"] = {(prefix + key, *rest) for key, *rest in report["mismatched_keys"]}
        return model, report

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **inputs: Any) -> SemanticSegmenterOutput:
        """Classifies pixels.

        Args:
            pixel_values: [B, C, Y, X].
            labels: [B, Y', X'] classes, or −100; logits are interpolated to that size.
            **inputs: What else the encoder takes.

        Returns:
            `logits` [B, L, rows · S, columns · S], and the mean cross-entropy where there are labels.
        """
        inputs["return_dict"] = True
        encoded = self.backbone(pixel_values=pixel_values, **inputs)
        logits = self.head(self._lay(encoded.last_hidden_state, pixel_values))
        loss = None
        if labels is not None:
            wide = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear")
            loss = F.cross_entropy(wide, labels)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=encoded.get("hidden_states"), attentions=encoded.get("attentions")
        )

    def _lay(self, hidden: Tensor, pixel_values: Tensor) -> Tensor:
        """Lays the patches of [B, T, D] on their grid, [B, D, rows, columns]; other tokens stand in front of them."""
        patch = self.config.patch_size
        rows, columns = (side // patch for side in pixel_values.shape[-2:])
        if hidden.dim() != 3 or hidden.shape[1] < rows * columns:
            raise ValueError(
                f"{self.config.model_type} gives features of shape {tuple(hidden.shape)} for {rows} × {columns} "
                "patches: expected a token for each. Choose a backbone whose tokens are patches, such as ViT."
            )
        return hidden[:, -rows * columns :].transpose(1, 2).reshape(hidden.shape[0], -1, rows, columns)


def seeing_all(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the config of the encoder that sees every patch, where one's type hides some; others as they are."""
    kind = ENCODERS.get(config.model_type)
    if kind is None:
        return config
    own = set(kind().to_dict()) - {"model_type", "architectures"}
    values = {key: value for key, value in config.to_dict().items() if key in own}
    return kind(**values)
