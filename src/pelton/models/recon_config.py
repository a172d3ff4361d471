"""The sizes of a Recon model, and how it is trained."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from pelton.errors import SpecError, unknown

IGNORED = -100
TASKS = ("pretrain", "finetune")


@strict
class ReconConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """The sizes of a Recon model, and how it is trained.

    Attributes:
        image_size: Y and X, or one number for both.
        patch_size: P, a divisor of both.
        num_channels: C.
        hidden_size: D of the encoder, a multiple of its heads and of 4.
        num_hidden_layers: Blocks of the encoder.
        num_attention_heads: H of the encoder.
        intermediate_size: Width of the encoder's MLPs.
        decoder_hidden_size: D of the decoder, likewise.
        decoder_num_hidden_layers: Blocks of the decoder.
        decoder_num_attention_heads: H of the decoder.
        decoder_intermediate_size: Width of the decoder's MLPs.
        hidden_act: Between the two layers of an MLP.
        hidden_dropout_prob: Behind attention and MLP.
        attention_probs_dropout_prob: Of attention weights.
        qkv_bias: Whether queries, keys and values have biases.
        layer_norm_eps: Of the norms.
        initializer_range: Deviation of the first token that stands for hidden patches.
        mask_ratio: Share of the patches that are hidden in pretraining.
        norm_pix_loss: Whether the loss scales each patch to mean 0 and deviation 1.
        cells: S: a patch has S × S logits of each class, which are interpolated to pixels.
        semantic_loss_ignore_index: The label that counts nowhere.
        use_dilated: Whether dilated attention is to stand beside each block's own; see `PeltonConfig.from_backbone`.
        task_type: "pretrain" or "finetune": which of the two ratios holds. A segmenter sets it to "finetune".
        pretrain_dilated_ratio: The dilated attention's share of a block's attention in pretraining, from 0 to 1.
        finetune_dilated_ratio: Likewise in fine-tuning.
    """

    model_type = "recon"

    image_size: int | list[int] | tuple[int, ...] = 96
    patch_size: int = 8
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    intermediate_size: int = 768
    decoder_hidden_size: int = 128
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int = 4
    decoder_intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    cells: int = 4
    semantic_loss_ignore_index: int = IGNORED
    use_dilated: bool = False
    task_type: Literal["pretrain", "finetune"] = "pretrain"
    pretrain_dilated_ratio: float = 0.01
    finetune_dilated_ratio: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks what sizes and shares must obey.

        Raises:
            SpecError: a law is broken; the message has the law and the values.
        """
        super().__post_init__(**kwargs)
        if self.task_type not in TASKS:
            raise unknown("task_type", self.task_type, TASKS)
        if isinstance(self.image_size, list | tuple):
            self.image_size = [int(side) for side in self.image_size]
        for side in self.sides:
            _require(side % self.patch_size == 0, "image_size % patch_size == 0", self, "image_size", "patch_size")
        for part in ("", "decoder_"):
            size, heads = f"{part}hidden_size", f"{part}num_attention_heads"
            _require(getattr(self, size) % getattr(self, heads) == 0, f"{size} % {heads} == 0", self, size, heads)
            _require(getattr(self, size) % 4 == 0, f"{size} % 4 == 0 (sines and cosines of 2 axes)", self, size)
        _require(0 < self.mask_ratio < 1, "0 < mask_ratio < 1", self, "mask_ratio")
        for name in ("pretrain_dilated_ratio", "finetune_dilated_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"0 <= {name} <= 1", self, name)

    @property
    def sides(self) -> tuple[int, int]:
        """Y and X."""
        size = self.image_size
        if isinstance(size, int):
            return size, size
        _require(len(size) == 2, "image_size is one number, or height and width", self, "image_size")
        return size[0], size[1]


def _require(holds: bool, law: str, config: ReconConfig, *names: str) -> None:
    if not holds:
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
        raise SpecError(f"`{law}` must hold, but got {got}.")
