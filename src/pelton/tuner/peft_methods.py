"""PEFT's layer methods as methods of Pelton: `Peft(config=LoHaConfig(r=8), sites=("attn.q", "attn.v"))`.

A method of PEFT can be gated when its contribution can be told from its layer's own output without computing that
output again. Each that can is a kind of its own ("loha", "dora", …): it is named, switched, pruned, given a learning
rate and saved under that kind as our own methods are. `peft_refused.py` says why others cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pelton.errors import SpecError, unknown
from pelton.methods import LINEAR_SITES, METHODS, MethodSpec, Shape
from pelton.registry import require
from pelton.tuner.peft_part import PeftPart
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
        return cast(
            Self, super().__new__(cast(Any, _class_of(config)) if cls is Peft else cls, config, *args, **kwargs)
        )

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
                if name not in _names(blank):
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
        return any(value for name, value in self.config.items() if name.endswith("dropout"))

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
    known = [cls for cls in (METHODS[kind] for kind in METHODS) if issubclass(cls, Peft)]
    for cls in known:
        if cls.peft_type == config.peft_type and all(getattr(config, k) == v for k, v in cls.fixed.items()):
            return cls
    raise refused_method(str(getattr(config.peft_type, "value", config.peft_type)), [cls.kind for cls in known])


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
        require(not name.endswith("dropout") or 0 <= value < 1, f"0 <= {name} < 1", value=value)
        require(name not in ("r", "n_frequency") or value > 0, f"{name} > 0", value=value)
