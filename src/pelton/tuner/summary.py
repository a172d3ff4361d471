"""What the gates let through, in one table: a row per block, a column per method."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.gates import Place, StaticGate
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.config import WEIGHTS, PeltonConfig
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
        is left to the block's own attention, 1 − `dilated`), the methods' `sum` (with `original`, where `dilated` is
        the only one), `requires_grad` (whether anything of the gate is trained) and `is_buffer` (whether its values are
        constants).

    Raises:
        AdapterError: gates that read the input, without a frame.
    """
    import pandas as pd

    rows = []
    for index, block in enumerate(gated_blocks(model)):
        adapter = block.adapters_at_work[0]
        if adapter in block.wirings:
            rows.append({"index": index, "block": block.block.name, **_row(block, adapter, frame)})
    return _arranged(pd.DataFrame(rows))


def saved_gates(folder: Path) -> pd.DataFrame:
    """Returns the same table of a saved adapter, without its backbone; encoders come before decoders.

    Raises:
        AdapterError: its gates read the input, or its weights do not fit its config.
    """
    import pandas as pd

    config = PeltonConfig.from_pretrained(str(folder))
    if not config.gate_spec.static:
        raise AdapterError(
            f"The gates of {folder} read the input, so their values depend on data. Load the adapter with its "
            "backbone, record some with record_gates, and call gate_summary(model, log.to_frame())."
        )
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(folder / WEIGHTS).items():
        block, inside, name = key.removeprefix("base_model.model.").partition(".pelton.gates.")
        if inside:
            found[block][name] = value
    indices = [i for i in range(len((config.backbone or {}).get("hidden_sizes", ()))) if _kinds(config, i)]
    if len(indices) != len(found):
        raise AdapterError(f"{folder} holds gates of {len(found)} blocks; its config asks for {len(indices)}.")
    rows = []
    for index, block in zip(indices, sorted(found, key=_natural), strict=True):
        kinds = _kinds(config, index)
        gate = cast(StaticGate, config.gate_spec.build(Place(kinds, 1, causal=False, index=index)))
        try:
            gate.load_state_dict(found[block])
        except RuntimeError as error:
            raise AdapterError(f"The gate of {block} in {folder} does not fit its config: {error}") from error
        values = dict(zip(kinds, gate.values().tolist(), strict=True))
        rows.append({"index": index, "block": block, **_weights(values, list(gate.parameters()))})
    return _arranged(pd.DataFrame(rows))


def _kinds(config: PeltonConfig, index: int) -> tuple[str, ...]:
    here = (spec.kind for spec in config.specs if spec.layers is None or index in spec.layers)
    return tuple(kind for kind in here if kind not in config.pruned_from(index))


def _natural(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Orders block names as models do: 2 before 10, encoders before decoders."""
    return "decoder" in name, [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _arranged(table: pd.DataFrame) -> pd.DataFrame:
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
    return _weights({method: float(values[method]) for method in gate.methods if method in here}, parameters)


def _weights(found: dict[str, float], parameters: list[nn.Parameter]) -> dict[str, Any]:
    original = {"original": 1.0 - found["dilated"]} if "dilated" in found else {}
    counted = found | original if len(found) == 1 else found
    return {
        **found,
        **original,
        "sum": float(sum(counted.values())),
        "requires_grad": any(p.requires_grad for p in parameters),
        "is_buffer": not parameters,
    }
