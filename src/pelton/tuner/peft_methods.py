"""PEFT's layer methods as methods of Pelton: `Peft(config=LoHaConfig(r=8), sites=("attn.q", "attn.v"))`.

A method of PEFT can be gated when its contribution can be told from its layer's own output without computing that
output again. Each that can is a kind of its own ("loha", "dora", …): it is named, switched, pruned, given a learning
rate and saved under that kind as our own methods are. `peft_refused.py` says why others cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from torch.nn.parameter import Parameter

from pelton.errors import SpecError, unknown
from pelton.methods import LINEAR_SITES, METHODS, MethodSpec, Shape
from pelton.registry import require
from pelton.tuner.peft_part import OWN, PeftPart, make_layer
from pelton.tuner.peft_refused import refused_field, refused_method

_LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class Peft(MethodSpec):
    """A layer method of PEFT; made from its config it is a spec of that method's own kind.

    Attributes:
        config: PEFT's config of the method, or its values by name. Kept are the values that differ from PEFT's own
            defaults. Where the method goes is not said in it, but by `sites` and `layers`.
        sites: the linear sites it goes to.
        layers: block indices; None means all.
    """

    allowed: ClassVar[tuple[str, ...]] = LINEAR_SITES
    foldable: ClassVar[bool] = True
    peft_type: ClassVar[str]
    """The method's name in PEFT."""
    fields: ClassVar[tuple[str, ...]]
    """What of PEFT's config is taken."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """What of it is always so."""
    edits: ClassVar[Literal["input", "output"]] = "output"
    """Which tensor the layer changes."""
    reads_output: ClassVar[bool] = False
    """Whether the contribution depends on the backbone's output, or is only added to it."""
    reads_weight: ClassVar[bool] = False
    """Whether it depends on the backbone's weight."""

    config: Any = dataclasses.field(default_factory=dict)
    sites: tuple[str, ...] = ("attn.q", "attn.v")
    layers: tuple[int, ...] | None = None

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Makes a spec of the class that PEFT's config belongs to."""
        return super().__new__(cast(Any, _class_of(config)) if cls is Peft else cls)

    def __post_init__(self) -> None:
        """Reduces the config to what differs from PEFT's defaults, and checks it.

        Raises:
            SpecError: a value that the method cannot be gated with, or that PEFT refuses.
            UnknownName: a key that PEFT does not have, with the nearest.
        """
        super().__post_init__()
        given = _values(self.config, self)
        blank = PEFT_TYPE_TO_CONFIG_MAPPING[cast(Any, self.peft_type)]()
        for name, value in given.items():
            if name not in self.fields:
                if not hasattr(blank, name) or isinstance(self.config, Mapping) and name not in _names(blank):
                    raise unknown(f"key of PEFT's {type(blank).__name__}", name, self.fields)
                raise refused_field(self.kind, name, value)
            _check_value(self.kind, name, value, getattr(blank, name))
        object.__setattr__(self, "config", {k: v for k, v in given.items() if v != getattr(blank, k)})
        self.peft_config()

    def peft_config(self) -> PeftConfig:
        """Makes PEFT's config of the method for one layer.

        Raises:
            SpecError: PEFT refuses the values together.
        """
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[cast(Any, self.peft_type)]
        try:
            return kind(**self.config, **self.fixed, target_modules=[_LAYER])
        except (ValueError, TypeError) as error:
            raise SpecError(f"PEFT refuses {self.kind!r} with {self.config!r}: {error}") from error

    @property
    def drops(self) -> bool:
        """Whether something is dropped in training."""
        return any(value for name, value in self.config.items() if "dropout" in name)

    def build(self, shape: Shape) -> PeftPart:
        """Makes PEFT's layer for one linear layer."""
        return PeftPart(self, shape)

    def start(self, layer: Any) -> None:
        """Gives PEFT's layer those initial values that depend on the backbone's weight."""


def _class_of(config: Any) -> type[Peft]:
    """Returns the class of specs that a config of PEFT belongs to."""
    if not isinstance(config, PeftConfig):
        raise SpecError(
            f"Peft takes a config of a layer method of PEFT, such as peft.LoHaConfig(r=8), but got {config!r}. "
            "In a recipe write its kind: {kind: loha, config: {r: 8}}."
        )
    name = str(getattr(config.peft_type, "value", config.peft_type))
    name = "DORA" if name == "LORA" and getattr(config, "use_dora", False) else name
    known = {cls.kind.upper(): cls for cls in Peft.__subclasses__()}
    if name not in known:
        raise refused_method(name, [cls.kind for cls in known.values()])
    return known[name]


_NOTES = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "save_projection")
"""What PEFT notes in a config, and what is decided here: VeRA's projections are drawn anew from their seed."""


def _values(config: Any, spec: Peft) -> dict[str, Any]:
    """Returns the values of a config that are not PEFT's defaults."""
    if isinstance(config, PeftConfig):
        if config.peft_type != spec.peft_type:
            raise SpecError(f"{spec.kind!r} takes PEFT's {spec.peft_type}, but got a {type(config).__name__}.")
        blank = type(config)()
        given = {name: getattr(config, name) for name in _names(config)}
        given = {name: value for name, value in given.items() if value != getattr(blank, name)}
    elif isinstance(config, Mapping):
        given = {str(name): value for name, value in config.items()}
        if given.get("peft_type", spec.peft_type) != spec.peft_type:
            raise SpecError(f"{spec.kind!r} takes PEFT's {spec.peft_type}, but got peft_type={given['peft_type']!r}.")
    else:
        raise SpecError(f"config of {spec.kind!r} is a config of PEFT or its values by name, but got {config!r}.")
    return {k: v for k, v in given.items() if k not in _NOTES and (k not in spec.fixed or v != spec.fixed[k])}


def _names(config: PeftConfig) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, config))]


def _check_value(kind: str, name: str, value: Any, like: Any) -> None:
    """Refuses a value of another type than PEFT's default, and numbers that are never right."""
    law = f"{name} of {kind!r} is "
    if name.startswith("init_"):
        require(isinstance(value, bool | str), f"{law}true, false or a name", value=value)
    elif isinstance(like, bool):
        require(isinstance(value, bool), f"{law}true or false", value=value)
    elif isinstance(like, int | float):
        require(isinstance(value, int | float) and not isinstance(value, bool), f"{law}a number", value=value)
        whole = isinstance(like, int) and "alpha" not in name
        require(not whole or isinstance(value, int), f"{law}a whole number", value=value)
        require("dropout" not in name or 0 <= value < 1, f"0 <= {name} < 1", value=value)
        require(name not in ("r", "n_frequency") or value > 0, f"{name} > 0", value=value)


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
        magnitude.weight = Parameter(magnitude.weight.detach().float())


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
