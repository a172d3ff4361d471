"""The way back from a folded model: what folding loses is kept, and what is learned since stays learned.

What was folded comes back to the bit. Of what did not fold, tensors that have not changed since come back too; those
that were trained since stay as they are. A prefix that became keys and values cannot take those back into its network
or its tokens, and what was made smaller since fits nothing: both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.gates.static import FixedGateModule
from pelton.tuner.block import gate_of
from pelton.tuner.config import PeltonConfig
from pelton.tuner.model import PeltonModel
from pelton.tuner.quantised import Lost
from pelton.tuner.recast import adapter_tensors
from pelton.tuner.store import digest


@dataclass(frozen=True)
class Folded:
    """The way back from a folded model.

    Attributes:
        adapter: The adapter's name.
        config: Its config before.
        tensors: Its tensors before.
        weights: The backbone's weights that changed, as they were, by name.
        digest: A hash of those weights as they are since.
        heads: Modules that were trained whole, as they were before they were trained, by name.
        lost: What rounding to few bits took; None where every weight is exact.
        kinds: The methods that were folded.
        columns: The places of those that were not in each block's gate, by name of the block.
        off: The methods that `set_methods` had turned off, by name of the block.
        rest: Hashes of the tensors that were left, by name.
    """

    adapter: str
    config: PeltonConfig
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    digest: str
    heads: dict[str, nn.Module]
    lost: Lost | None
    kinds: frozenset[str]
    columns: dict[str, list[int]]
    off: dict[str, frozenset[str]]
    rest: dict[str, str]


def record(tuner: PeltonModel, name: str, weights: dict[str, Tensor], rounded: Lost | None) -> Folded:
    """Keeps what folding loses.

    Args:
        tuner: Holds the adapter as it is before.
        name: The adapter's name.
        weights: The backbone's weights that are to change, as they are, by name.
        rounded: What rounding will take.
    """
    blocks = {path: gated for path, gated in tuner.named_blocks() if name in gated.wirings}
    kinds = frozenset(s.kind for gated in blocks.values() for s in gated.wirings[name].methods if s.foldable)
    heads = {
        path: module.original_module
        for path, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return Folded(
        adapter=name,
        config=tuner.peft_config[name],
        tensors={key: value.detach().clone() for key, value in adapter_tensors(tuner, name).items()},
        weights=weights,
        digest="",
        heads=heads,
        lost=rounded,
        kinds=kinds,
        columns={
            path: [number for number, kind in enumerate(gate_of(gated, name).methods) if kind not in kinds]
            for path, gated in blocks.items()
        },
        off={path: gated.off for path, gated in blocks.items()},
        rest={},
    )


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns a hash of each tensor."""
    return {key: digest({key: value}) for key, value in tensors.items()}


def whole(tuner: PeltonModel, folded: Folded) -> dict[str, Tensor]:
    """Returns the tensors of the adapter before it was folded, with what its rest has learned since.

    Raises:
        AdapterError: the rest has another shape, or was trained and has no place in what it was.
    """
    if folded.adapter not in tuner.peft_config:
        raise AdapterError(f"Adapter {folded.adapter!r}, the rest of what was folded, has been deleted since.")
    now, found = adapter_tensors(tuner, folded.adapter), dict(folded.tensors)
    if tuner.peft_config[folded.adapter].steps or now.keys() != folded.rest.keys():
        raise AdapterError(
            f"The rest of adapter {folded.adapter!r} was made smaller since it was folded. Bring that back first: "
            "pelton.revive(model)."
        )
    fixed = tuple(
        f"{path}.gates."
        for path, gated in tuner.named_blocks()
        if folded.adapter in gated.wirings and isinstance(gate_of(gated, folded.adapter), FixedGateModule)
    )
    learned = {key for key, was in hashes(now).items() if was != folded.rest[key] and not key.startswith(fixed)}
    for key in learned:
        found[key] = _placed(now[key].detach(), key, folded)
    return found


def _placed(value: Tensor, key: str, folded: Folded) -> Tensor:
    """Returns a tensor that was trained since, in the place that it had."""
    path, inside, _ = key.partition(".gates.")
    before = folded.tensors.get(key)
    if before is not None and inside:
        both = before.to(value.device).clone()
        both[..., folded.columns[path]] = value
        return both
    if before is None or before.shape != value.shape:
        raise AdapterError(
            f"{key} was trained since the prefix became keys and values, and what it was made of cannot give them: "
            "unfolding would lose that. Go on with the folded model, or train with parametrisation='kv'."
        )
    return value


def turn_off(tuner: PeltonModel, folded: Folded) -> None:
    """Turns methods off that were off when they were folded; the others stay as they are."""
    for path, gated in tuner.named_blocks():
        if path in folded.off:
            gated.off = (gated.off - folded.kinds) | (folded.off[path] & folded.kinds)


def heads_back(tuner: PeltonModel, folded: Folded) -> None:
    """Puts modules that were trained whole back beside what they became."""
    for path, original in folded.heads.items():
        cast(Any, tuner.model.get_submodule(path)).original_module = original
