"""Constant gates by least squares: in each block those that change its output least.

With h(g) a block's output at constant gates g, h* its output under the learned ones, and J_m = ∂h/∂g_m at a start g₀
(by differences), one Gauss-Newton step over all positions that are no padding gives

    g = g₀ + t · argmin_δ Σ ‖h* − h(g₀) − Σ_m δ_m J_m‖²,    kept in [0, 1],

where t is the best of 0, 1/4, 1/2 and 1 on the same data, since blocks are not linear in their gates. Each block reads
what it reads in the model with learned gates. It costs M + 5 further forwards of every block, in two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pelton.compress.over import Batches, BlockValues, run_over
from pelton.gates.static import FixedGateModule
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.model import PeltonModel

STEP = 0.05
PARTS = (0.0, 0.25, 0.5, 1.0)
"""Of the step, what is tried; the start is among it."""
RIDGE = 1e-6
"""Relative to the mean of the diagonal: directions that do nothing stay where they are."""

Values = dict[str, float]


def fitted(model: nn.Module, tuner: PeltonModel, adapter: str, batches: Batches, start: BlockValues) -> BlockValues:
    """Returns the fitted values of every block.

    Args:
        model: What runs.
        tuner: Holds the adapter.
        adapter: Its name.
        batches: Inputs; read twice.
        start: The values around which blocks are taken for linear.
    """
    blocks = {path: gated for path, gated in tuner.named_blocks() if adapter in gated.wirings}
    equations = {path: _Equations(gated, adapter, start[str(gated.block.index)]) for path, gated in blocks.items()}
    _watch(model, tuner, equations, batches)
    lines = {path: _Line(gated, adapter, equations[path]) for path, gated in blocks.items()}
    _watch(model, tuner, lines, batches)
    return {str(gated.block.index): lines[path].best() for path, gated in blocks.items()}


def _watch(model: nn.Module, tuner: PeltonModel, probes: Mapping[str, _Probe], batches: Batches) -> None:
    """Runs the model over the data while probes look at its blocks."""
    handles = []
    try:
        for path, probe in probes.items():
            block = tuner.model.get_submodule(path)
            handles.append(block.register_forward_hook(probe, with_kwargs=True))
            handles.append(gate_of(probe.gated, probe.adapter).register_forward_hook(probe.see_mask))
        run_over(model, batches)
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Runs one block again at constant gates whenever it runs."""

    def __init__(self, gated: GatedBlock, adapter: str) -> None:
        self.gated, self.adapter = gated, adapter
        self.numbers = gated.wirings[adapter].numbers
        self.mask: Tensor | None = None
        self.inside = False

    def compare(self, wanted: Tensor, at: Callable[[Values], Tensor]) -> None:
        """Takes in the block's output [positions, D] under the learned gates, and what gives it at constant ones."""
        raise NotImplementedError

    def see_mask(self, gate: nn.Module, args: tuple[Any, ...], values: Tensor) -> None:
        """Keeps the mask [B, T] that the gate was given."""
        self.mask = args[1]

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compares the block's output with those at constant gates."""
        if not self.inside:
            self.inside = True
            try:
                self.compare(self._positions(output), partial(self._run, block, args, kwargs))
            finally:
                self.inside = False

    def _run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], values: Values) -> Tensor:
        """Returns the block's output [positions, D] at constant gates."""
        learned = gate_of(self.gated, self.adapter)
        row = [0.0] * len(learned.methods)
        for number, value in zip(self.numbers, values.values(), strict=True):
            row[number] = value
        constant = FixedGateModule(learned.methods, {"": row}, None).to(next(block.parameters()).device)
        self.gated.gates[self.adapter] = constant
        try:
            return self._positions(block(*args, **kwargs))
        finally:
            self.gated.gates[self.adapter] = learned

    def _positions(self, output: Any) -> Tensor:
        """Returns a block's hidden states [positions, D], those of padding left out."""
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        flat = hidden.float().reshape(-1, hidden.shape[-1])
        if self.mask is None or self.mask.numel() != flat.shape[0]:
            return flat
        return flat[self.mask.reshape(-1).bool()]


class _Equations(_Probe):
    """Gathers the normal equations of the least-squares step."""

    def __init__(self, gated: GatedBlock, adapter: str, start: Values) -> None:
        super().__init__(gated, adapter)
        self.start = start
        self.products = torch.zeros(len(start), len(start)).double()
        self.targets = torch.zeros(len(start)).double()

    def compare(self, wanted: Tensor, at: Callable[[Values], Tensor]) -> None:
        """Adds the block's slopes, and what its output lacks at the start."""
        at_start, slopes = at(self.start), []
        for kind, value in self.start.items():
            step = STEP if value + STEP <= 1 else -STEP
            slopes.append((at({**self.start, kind: value + step}) - at_start) / step)
        jacobian = torch.stack(slopes, dim=1).double()  # [positions, M, D]
        self.products += torch.einsum("nmd,nkd->mk", jacobian, jacobian).cpu()
        self.targets += torch.einsum("nmd,nd->m", jacobian, (wanted - at_start).double()).cpu()

    def solve(self) -> Values:
        """Returns the step δ by kind."""
        ridge = RIDGE * self.products.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        delta = torch.linalg.solve(self.products + ridge * torch.eye(len(self.targets)).double(), self.targets)
        return dict(zip(self.start, delta.tolist(), strict=True))


class _Line(_Probe):
    """Measures how far along the step the block's output is nearest to the learned one."""

    def __init__(self, gated: GatedBlock, adapter: str, equations: _Equations) -> None:
        super().__init__(gated, adapter)
        start, step = equations.start, equations.solve()
        self.points = [{k: min(1.0, max(0.0, v + part * step[k])) for k, v in start.items()} for part in PARTS]
        self.errors = [0.0] * len(PARTS)

    def compare(self, wanted: Tensor, at: Callable[[Values], Tensor]) -> None:
        """Adds the squared errors."""
        for number, point in enumerate(self.points):
            self.errors[number] += float((at(point) - wanted).double().square().sum())

    def best(self) -> Values:
        """Returns the point with the smallest error."""
        return self.points[self.errors.index(min(self.errors))]
