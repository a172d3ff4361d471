"""What the gates let through, in one table: a row per block, a column per method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pelton.errors import AdapterError
from pelton.gates import StaticGate
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.controls import gated_blocks

if TYPE_CHECKING:
    import pandas as pd


def gate_summary(model: nn.Module, frame: pd.DataFrame | None = None) -> pd.DataFrame:
    """Returns the effective weight of every method in every block, for the first active adapter.

    Effective means after sigmoid or softmax, what the methods' contributions are multiplied by, never a raw parameter.

    Args:
        model: a model with an adapter.
        frame: gate values that `record_gates` saw; not needed for static gates. Their means are shown.

    Returns:
        One row per block: `index`, `block`, a column for each method, where there is dilated attention `original` (what
        is left to the block's own attention, 1 − `dilated`), `sum` of all these, `requires_grad` (whether anything of
        the gate is trained) and `is_buffer` (whether its values are constants).

    Raises:
        AdapterError: gates that read the input, without a frame.
    """
    import pandas as pd

    rows = []
    for index, block in enumerate(gated_blocks(model)):
        adapter = block.adapters_at_work[0]
        if adapter in block.wirings:
            rows.append({"index": index, "block": block.block.name, **_row(block, adapter, frame)})
    table = pd.DataFrame(rows)
    last = [*(["original"] if "original" in table else []), "sum", "requires_grad", "is_buffer"]
    return table[[c for c in table.columns if c not in last] + last]


def _row(block: GatedBlock, adapter: str, frame: pd.DataFrame | None) -> dict[str, Any]:
    gate = gate_of(block, adapter)
    if isinstance(gate, StaticGate):
        values = dict(zip(gate.methods, gate.values().tolist(), strict=True))
    elif frame is None:
        raise AdapterError(
            "These gates read the input, so their values depend on data. Record some: "
            "`with record_gates(model) as log: model(**batch)`, then gate_summary(model, log.to_frame())."
        )
    else:
        mine = frame[frame.block.str.endswith(block.block.name) & (frame.adapter == adapter)]
        values = {str(k): float(v) for k, v in mine.groupby("method").value.mean().items()}
    parameters = list(gate.parameters())
    here = {spec.kind for spec in block.wirings[adapter].methods}  # a gate may have values of methods that are gone
    found = {method: float(values[method]) for method in gate.methods if method in here}
    if "dilated" in found:
        found["original"] = 1.0 - found["dilated"]
    return {
        **found,
        "sum": float(sum(found.values())),
        "requires_grad": any(p.requires_grad for p in parameters),
        "is_buffer": not parameters,
    }
