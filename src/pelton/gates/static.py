"""Gates that do not read the input: learned scalars, and constants.

`ScalarGate`: g = sigmoid(θ), one θ per method and block. `init` is the *effective* weight: 0.01 means 0.01, so
θ = logit(0.01), never the raw parameter (sigmoid(0.01) is 0.5025).

`FixedGate`: constants in buffers, without gradient, the same in every block; several named stages if need be.

`FrozenGate`: constants too, but a value for each block: what `pelton.freeze_gates` makes of gates that were learned.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pelton.errors import SpecError, unknown
from pelton.gates.base import GATES, GateSpec, Place, StaticGate
from pelton.registry import require

SHUT = (
    "FixedGate holds every gate at 0, so the adapter adds nothing and its methods get no gradient. Give it ratios "
    "above 0 (FixedGate(1.0) for methods without gates), or use a gate that learns, such as MLPGate()."
)

Ratio = float | Mapping[str, float]
"""One gate value for all methods, or one for each kind."""


@GATES.register
@dataclasses.dataclass(frozen=True)
class ScalarGate(GateSpec):
    """One learned value per method and block.

    Attributes:
        init: the effective gate value at the start, between 0 and 1.
    """

    kind: ClassVar[str] = "scalar"
    static: ClassVar[bool] = True

    init: float = 0.5

    def __post_init__(self) -> None:
        """Checks type and range."""
        super().__post_init__()
        require(0 < self.init < 1, "0 < init < 1", init=self.init)

    def build(self, place: Place) -> ScalarGateModule:
        """Makes the gate of one block."""
        return ScalarGateModule(self, place)


class ScalarGateModule(StaticGate):
    """θ [M]."""

    def __init__(self, spec: ScalarGate, place: Place) -> None:
        """Makes θ = logit(init)."""
        super().__init__(place.methods, "static")
        self.theta = nn.Parameter(torch.full((len(place.methods),), math.log(spec.init / (1 - spec.init))))

    def values(self) -> Tensor:
        """Returns sigmoid(θ), [M]."""
        return self.theta.float().sigmoid()


@GATES.register
@dataclasses.dataclass(frozen=True)
class FixedGate(GateSpec):
    """Constants: forced ratios, or 1.0 for plain methods without gates.

    Attributes:
        value: `0.5` for all methods, or `{"lora": 1.0, "prefix": 0.2}`.
        stages: named ratios instead of `value`: `{"pretrain": 0.01, "finetune": 0.1}`.
        stage: the stage to start in; the first when not given.
    """

    kind: ClassVar[str] = "fixed"
    static: ClassVar[bool] = True

    value: Ratio = 1.0
    stages: Mapping[str, Ratio] | None = None
    stage: str | None = None

    def __post_init__(self) -> None:
        """Checks that every ratio is a number in [0, 1] and that the stage exists."""
        super().__post_init__()
        require(self.stages is None or isinstance(self.stages, Mapping), "stages are by name", stages=self.stages)
        for ratio in self.table.values():
            for value in ratio.values() if isinstance(ratio, Mapping) else (ratio,):
                require(_is_ratio(value), "0 <= ratio <= 1", ratio=value)
        require(len(self.table) > 0, "stages has at least one entry", stages=self.stages)
        if self.stage is not None and self.stage not in self.table:
            raise unknown("stage", self.stage, self.table)

    @property
    def table(self) -> dict[str, Ratio]:
        """Ratios by stage; one nameless stage when there are no stages."""
        return {"": self.value} if self.stages is None else dict(self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return super().to_dict() | {"stages": None if self.stages is None else dict(self.stages)}

    @property
    def shut(self) -> bool:
        """Whether every ratio is 0 for good, as no stage opens one."""
        ratios = self.value.values() if isinstance(self.value, Mapping) else (self.value,)
        return self.stages is None and not any(ratios)

    def build(self, place: Place) -> FixedGateModule:
        """Makes the gate of one block."""
        rows = {stage: _row(ratio, place.methods) for stage, ratio in self.table.items()}
        return FixedGateModule(place.methods, rows, self.stage, shut=self.shut)


Values = Mapping[str, Mapping[str, float]]
"""Gate values by block number (as text, since JSON has no other keys) and kind of method."""


@GATES.register
@dataclasses.dataclass(frozen=True)
class FrozenGate(GateSpec):
    """Constants that data chose, for each block its own.

    Attributes:
        values: `{"0": {"lora": 0.4, "bottleneck": 0.6}, "1": …}`, by block number and kind.
        stages: named values instead, such as one set for each task; `set_stage` switches.
        stage: the stage to start in; the first when not given.
    """

    kind: ClassVar[str] = "frozen"
    static: ClassVar[bool] = True

    values: Values = dataclasses.field(default_factory=dict)
    stages: Mapping[str, Values] | None = None
    stage: str | None = None

    def __post_init__(self) -> None:
        """Checks that every value is a number in [0, 1] and that the stage exists."""
        super().__post_init__()
        require(self.stages is None or isinstance(self.stages, Mapping), "stages are by name", stages=self.stages)
        require(len(self.table) > 0, "stages has at least one entry", stages=self.stages)
        for values in self.table.values():
            require(isinstance(values, Mapping), "values are by block", values=values)
            for block, row in values.items():
                require(isinstance(block, str), "blocks are numbers as text, such as '0'", block=block)
                require(isinstance(row, Mapping), "values of a block are by kind", block=block, values=row)
                for kind, value in row.items():
                    require(_is_ratio(value), "0 <= value <= 1", block=block, kind=kind, value=value)
        if self.stage is not None and self.stage not in self.table:
            raise unknown("stage", self.stage, self.table)

    @property
    def table(self) -> dict[str, Values]:
        """Values by stage; one nameless stage when there are no stages."""
        return {"": self.values} if self.stages is None else dict(self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        plain = {stage: {block: dict(row) for block, row in values.items()} for stage, values in self.table.items()}
        return super().to_dict() | ({"values": plain[""]} if self.stages is None else {"values": {}, "stages": plain})

    def build(self, place: Place) -> FixedGateModule:
        """Makes the gate of one block.

        Raises:
            SpecError: the block, or one of its methods, has no value.
        """
        rows = {}
        for stage, values in self.table.items():
            if str(place.index) not in values:
                raise SpecError(f"FrozenGate has no values for block {place.index}; it has {', '.join(values)}.")
            rows[stage] = _row(values[str(place.index)], place.methods)
        return FixedGateModule(place.methods, rows, self.stage)


class FixedGateModule(StaticGate):
    """Buffers: the current values [M], and those of all stages [S, M].

    A gate that is `shut` in every block warns when training begins: nothing behind it would learn.
    """

    value: Tensor
    ratios: Tensor
    shut: bool = False  # of modules that were pickled whole before there was this

    def __init__(
        self, methods: Sequence[str], rows: Mapping[str, Sequence[float]], stage: str | None, *, shut: bool = False
    ) -> None:
        """Makes the buffers of rows [M] by stage, and enters one stage, or the first."""
        super().__init__(methods, "static")
        self.shut = shut
        self.stages = tuple(rows)
        self.register_buffer("ratios", torch.tensor(list(rows.values())))
        self.register_buffer("value", torch.empty(len(methods)))
        self.enter(stage if stage is not None else self.stages[0])

    def train(self, mode: bool = True) -> Self:
        """Enters training or evaluation mode."""
        if mode and self.shut:
            warnings.warn(SHUT, stacklevel=2)  # by Python's own filters once, though every block says it
            self.shut = False
        return super().train(mode)

    def enter(self, stage: str) -> None:
        """Switches to the ratios of another stage, in place."""
        if stage not in self.stages:
            raise unknown("stage", stage, self.stages)
        self.value.copy_(self.ratios[self.stages.index(stage)])

    def values(self) -> Tensor:
        """Returns the current ratios, [M]."""
        return self.value


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _row(ratio: Ratio, methods: Sequence[str]) -> list[float]:
    if not isinstance(ratio, Mapping):
        return [float(ratio)] * len(methods)
    missing = [m for m in methods if m not in ratio]
    if missing:
        raise SpecError(f"The gate has no ratio for {', '.join(missing)}; it has {', '.join(ratio)}. Add one for each.")
    return [float(ratio[m]) for m in methods]
