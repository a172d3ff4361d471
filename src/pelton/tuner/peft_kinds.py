"""The methods of PEFT that are verified: each is PEFT's layer, under a kind of its own.

Letters: g the gate value, W the backbone's weight, x the layer's input, y its output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from torch import nn

from pelton.errors import SpecError
from pelton.methods import METHODS, Shape
from pelton.tuner.peft_methods import Peft
from pelton.tuner.peft_part import OWN, PeftPart, make_layer


@METHODS.register
@dataclasses.dataclass(frozen=True)
class LoHa(Peft):
    """Hadamard product of two low-rank updates (Hyeon-Woo et al. 2022, arXiv 2108.06098): y + g · (B₁A₁ ⊙ B₂A₂) x."""

    kind: ClassVar[str] = "loha"
    peft_type: ClassVar[str] = "LOHA"
    fields: ClassVar[tuple[str, ...]] = ("r", "alpha", "rank_dropout", "module_dropout", "init_weights")


@METHODS.register
@dataclasses.dataclass(frozen=True)
class LoKr(Peft):
    """Kronecker product of a small and a low-rank matrix (Yeh et al. 2024, arXiv 2309.14859): y + g · (C ⊗ B A) x."""

    kind: ClassVar[str] = "lokr"
    peft_type: ClassVar[str] = "LOKR"
    fields: ClassVar[tuple[str, ...]] = (
        *LoHa.fields,
        "rank_dropout_scale",
        "decompose_both",
        "decompose_factor",
    )


@METHODS.register
@dataclasses.dataclass(frozen=True)
class FourierFT(Peft):
    """An update that is sparse in the frequency domain (Gao et al. 2024, arXiv 2405.03003): y + g · F⁻¹(S) x."""

    kind: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    fields: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "random_loc_seed", "init_weights")


@METHODS.register
@dataclasses.dataclass(frozen=True)
class OFT(Peft):
    """Orthogonal finetuning (Qiu et al. 2023, arXiv 2306.07280): a block-diagonal rotation of the layer's input."""

    kind: ClassVar[str] = "oft"
    peft_type: ClassVar[str] = "OFT"
    edits: ClassVar[Literal["input", "output"]] = "input"
    fields: ClassVar[tuple[str, ...]] = (
        "r",
        "oft_block_size",
        "block_share",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "init_weights",
    )


@METHODS.register
@dataclasses.dataclass(frozen=True)
class DoRA(Peft):
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353): each row of W + B A rescaled to a learned norm m.

    y + g · (m / ‖W + s B A‖ · (W x + s B A x) − W x): W x is the layer's own output, without its bias. The norm is
    computed in every forward; that is DoRA's own cost, and no second product with W.
    """

    kind: ClassVar[str] = "dora"
    peft_type: ClassVar[str] = "LORA"
    fixed: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    reads_output: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    fields: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "use_rslora", "init_lora_weights")

    def __post_init__(self) -> None:
        """Refuses initial values that change the backbone."""
        super().__post_init__()
        start = self.config.get("init_lora_weights", True)
        if start not in (True, False, "gaussian", "orthogonal"):
            raise SpecError(
                f"init_lora_weights={start!r} changes the backbone's weights, so a closed gate would not give the "
                "backbone. Use true, false, 'gaussian' or 'orthogonal'."
            )

    def start(self, layer: Any) -> None:
        """Sets m to the norms of the rows of W + B A."""
        magnitude, down, up = layer.lora_magnitude_vector[OWN], layer.lora_A[OWN].weight, layer.lora_B[OWN].weight
        if down.is_meta or layer.base_layer.weight.is_meta:  # values are still to come
            return
        magnitude.update_layer(base_layer=layer.base_layer, lora_A=down, lora_B=up, scaling=layer.scaling[OWN])
        magnitude.weight = nn.Parameter(magnitude.weight.detach().float())


@METHODS.register
@dataclasses.dataclass(frozen=True)
class VeRA(Peft):
    """Vectors between frozen random matrices (Kopiczko et al. 2024, arXiv 2310.11454): y + g · b ⊙ B (d ⊙ A x).

    All layers share one A and one B, sized by the largest and cut to each, as in PEFT. They are not saved: their seed
    is.
    """

    kind: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    fields: ClassVar[tuple[str, ...]] = ("r", "projection_prng_key", "vera_dropout", "d_initial", "init_weights")

    def peft_config(self) -> PeftConfig:
        """Makes PEFT's config; projections are in no state dict."""
        config = super().peft_config()
        config.save_projection = False  # given at once, PEFT warns that other systems may draw other numbers
        return config

    def share(self, shapes: Sequence[Shape], parts: Sequence[nn.Module]) -> None:
        """Gives all parts one pair of random matrices, drawn from the seed."""
        widest = max(shape.in_features for shape in shapes), max(shape.out_features for shape in shapes)
        pair = make_layer(self, *widest)
        for part in parts:
            assert isinstance(part, PeftPart)
            part.layer.vera_A, part.layer.vera_B = part.vera_A, part.vera_B = pair.vera_A, pair.vera_B
