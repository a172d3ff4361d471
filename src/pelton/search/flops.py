"""What a method computes in a block, counted; and time as a linear function of it, fitted on what was measured.

    seconds = d + h(kind) · parts + a · FLOPs + b · elements,   all of them ≥ 0

d is what it costs to have anything in a block (hooks and the gate), h what a call of a part costs whatever its size, a
the time of a multiplication with its addition halved, b that of a number that is read or written. Letters: B batch, T
tokens, D hidden, I / O the features of a layer, R units of a part, K keys of a dilated query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from pelton.anatomy import Block
from pelton.methods import Bottleneck, DilatedAttention, LoRA, MethodSpec, Prefix, Shape

SCALE = 1e-9
"""FLOPs and elements are counted in billions, so that the columns of the fit are of like size."""


@dataclass(frozen=True)
class Work:
    """What a method does in one block.

    Attributes:
        parts: How many there are.
        flops: Of their products; an addition and a multiplication are two.
        elements: How many numbers are read and written beside weights.
    """

    parts: int
    flops: float
    elements: float


def work_of(spec: MethodSpec, block: Block, rows: int, tokens: int) -> Work:
    """Counts what a method does in a block, for inputs of `rows` examples of `tokens` tokens."""
    count: Count = COUNTS.get(spec.kind, _by_parameters)
    shapes = [shape for site in spec.sites if site in block.sites for shape in block.shapes(site)]
    pairs = [count(spec, shape, rows, tokens) for shape in shapes]
    return Work(len(pairs), sum(flops for flops, _ in pairs), sum(elements for _, elements in pairs))


def parameters_of(spec: MethodSpec, block: Block) -> int:
    """Counts a method's parameters in a block."""
    with torch.device("meta"):
        parts = [spec.build(shape) for site in spec.sites if site in block.sites for shape in block.shapes(site)]
    return sum(p.numel() for part in parts for p in part.parameters())


def backbone_flops(blocks: Sequence[Block], rows: int, tokens: int) -> float:
    """Counts the products of a backbone's blocks, attention included; embeddings and heads are left out."""
    found = 0.0
    for block in blocks:
        found += sum(
            2.0 * rows * tokens * place.in_features * place.out_features
            for places in block.sites.values()
            for place in places
            if place.path != block.attention
        )
        found += 4.0 * rows * tokens**2 * block.heads * block.head_dim
    return found


Count = Callable[[Any, Shape, int, int], tuple[float, float]]


def _lora(spec: LoRA, shape: Shape, rows: int, tokens: int) -> tuple[float, float]:
    every, wide = rows * tokens, shape.in_features + shape.out_features
    return 2.0 * every * spec.rank * wide, every * (wide + 2.0 * spec.rank)


def _bottleneck(spec: Bottleneck, shape: Shape, rows: int, tokens: int) -> tuple[float, float]:
    every, wide = rows * tokens, 2 * shape.out_features
    return 2.0 * every * spec.bottleneck_size * wide, every * (wide + 3.0 * spec.bottleneck_size)


def _prefix(spec: Prefix, shape: Shape, rows: int, tokens: int) -> tuple[float, float]:
    """Counts scores and sums over the prefix; keys, values and mask are copied to put it in front."""
    length = spec.prefix_length
    copied = 2.0 * rows * (tokens + length) * shape.out_features + rows * tokens * (tokens + length)
    return 4.0 * rows * tokens * length * shape.heads * shape.head_dim, copied


def _dilated(spec: DilatedAttention, shape: Shape, rows: int, tokens: int) -> tuple[float, float]:
    if shape.grid is not None and spec.space != "sequence":
        keys = sum(kernel**2 for kernel, _ in spec.kernels)
    else:
        keys = sum(max(1, min(segment, tokens) // rate) for segment, rate in spec.rates)
    wide = shape.heads * shape.head_dim
    return 4.0 * rows * tokens * keys * wide, 4.0 * rows * tokens * wide


def _elementwise(spec: MethodSpec, shape: Shape, rows: int, tokens: int) -> tuple[float, float]:
    wide = shape.in_features if spec.kind == "ia3" and shape.site == "ffn.out" else shape.out_features
    return float(rows * tokens * wide), 2.0 * rows * tokens * wide


def _by_parameters(spec: MethodSpec, shape: Shape, rows: int, tokens: int) -> tuple[float, float]:
    """Counts every weight once a token: what a product does, for methods that are not known here."""
    with torch.device("meta"):
        size = sum(p.numel() for p in spec.build(shape).parameters())
    return 2.0 * rows * tokens * size, float(rows * tokens * (shape.in_features + shape.out_features))


COUNTS: dict[str, Count] = {
    "lora": _lora,
    "bottleneck": _bottleneck,
    "prefix": _prefix,
    "dilated": _dilated,
    "ia3": _elementwise,
    "bitfit": _elementwise,
}


@dataclass(frozen=True)
class TimeModel:
    """Seconds as a linear function of work, on one machine.

    Attributes:
        block: d, of a block that has anything.
        part: h by kind; the mean of the others for a kind that was not measured.
        flop: a.
        element: b.
    """

    block: float
    part: dict[str, float]
    flop: float
    element: float

    def seconds(self, kind: str, work: Work) -> float:
        """Returns the time that a method adds to a block, d included."""
        part = self.part.get(kind, sum(self.part.values()) / max(1, len(self.part)))
        return self.block + part * work.parts + self.flop * work.flops + self.element * work.elements


def fit_times(
    kinds: Sequence[str], works: Sequence[Work], seconds: Sequence[float], weights: Sequence[float]
) -> TimeModel:
    """Fits the model by least squares without negative coefficients.

    Args:
        kinds: Of each measurement.
        works: Likewise.
        seconds: What was measured; noise may have made it negative.
        weights: What each residual is multiplied by.
    """
    known = list(dict.fromkeys(kinds))
    rows = np.array([_row(kind, work, known) for kind, work in zip(kinds, works, strict=True)])
    scale = np.asarray(weights, dtype=float)
    found, _ = nnls(rows * scale[:, None], np.asarray(seconds, dtype=float) * scale)
    block, flop, element, *parts = map(float, cast(NDArray[np.floating], found))
    return TimeModel(block, dict(zip(known, parts, strict=True)), flop * SCALE, element * SCALE)


def leave_one_out_errors(
    kinds: Sequence[str], works: Sequence[Work], seconds: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Returns, for each measurement, the weighted error of a model that was fitted without it."""
    errors = []
    for left in range(len(kinds)):
        others = [number for number in range(len(kinds)) if number != left]
        model = fit_times(*([column[n] for n in others] for column in (kinds, works, seconds, weights)))  # type: ignore[arg-type]
        errors.append((model.seconds(kinds[left], works[left]) - seconds[left]) * weights[left])
    return errors


def _row(kind: str, work: Work, known: Sequence[str]) -> list[float]:
    parts = [float(work.parts) if kind == one else 0.0 for one in known]
    return [1.0, work.flops * SCALE, work.elements * SCALE, *parts]
