"""What a plan refuses: gates and methods that do not go together, and sizes of what is not there."""

from __future__ import annotations

from collections.abc import Collection

from pelton.anatomy import Block
from pelton.errors import AnatomyError, SpecError, unknown
from pelton.gates import Gate, GumbelGate
from pelton.methods import DilatedAttention, MethodSpec, PrefixPart
from pelton.tuner.config import PeltonConfig


def check_sizes(config: PeltonConfig, known: Collection[str]) -> None:
    """Refuses sizes of parts that are not there; `known` names those that are, as `sizes` does.

    What was pruned keeps its size: it may come back.
    """
    for key in config.sizes:
        index, _, part = key.partition(".")
        kind = part.partition(".")[0]
        if key not in known and kind not in config.pruned.get(index, ()):
            raise unknown("part in sizes", key, known)


def check_candidates(config: PeltonConfig) -> None:
    """Refuses candidate sizes of methods that the adapter does not have."""
    gate = config.gate_spec
    for kind in gate.sizes if isinstance(gate, GumbelGate) else ():
        if kind not in (spec.kind for spec in config.specs):
            raise unknown("method of this adapter in GumbelGate.sizes", kind, [spec.kind for spec in config.specs])


def check_units(spec: MethodSpec, gate: Gate, cut: int | None) -> None:
    """Refuses gate values for units that a method does not have, or that do not open or shut it one by one."""
    if spec.kind not in gate.units:
        return
    if spec.size is None or not spec.gates_units:
        raise SpecError(f"{spec.kind!r} has one size only: leave it out of the gate's sizes.")
    start, stop = gate.units[spec.kind]
    own = getattr(spec, spec.size) if cut is None else cut
    if stop - start != own:
        raise SpecError(
            f"`the largest candidate is {spec.size}` must hold, but got sizes up to {stop - start} for {spec.kind!r} "
            f"with {spec.size}={own}. Change one of them."
        )


def check_prefix(kind: str, part: PrefixPart, gate: Gate) -> None:
    """Refuses gates that a prefix in the published form cannot have."""
    if part.gating == "scale" and kind in gate.units:
        raise SpecError("Prefix(gating='scale') takes one gate value. Use gating='mass', or leave it out of `sizes`.")
    if part.gating == "scale" and gate.granularity == "token":
        raise SpecError(
            "`gating='mass' or granularity != 'token'` must hold, but got gating='scale', granularity='token': one "
            "scaled key cannot differ from query to query. Use Prefix(gating='mass')."
        )


def check_dilated(spec: DilatedAttention, block: Block, model_type: str) -> None:
    """Refuses dilated attention where there is nothing to dilate."""
    if block.windowed:
        raise AnatomyError(
            f"Attention of {model_type!r} runs in windows, inside which there is nothing to dilate: 'dilated' cannot "
            f"go to {block.name!r}. Leave it out."
        )
    if spec.space == "grid" and block.grid is None:
        raise AnatomyError(
            f"The grid of patches in {block.name!r} of {model_type!r} cannot be told: its config needs image_size and "
            "patch_size, and its tokens must be all patches of one image. Use space='sequence', or name other layers."
        )
