"""PeltonConfig: which methods, under which gate. A PEFT config like any other; specs are saved with their kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, cast

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from pelton.arguments import Strict
from pelton.errors import AdapterError, SpecError, UnknownArgument
from pelton.gates import FixedGate, GateSpec, LinearGate, MLPGate
from pelton.methods import METHODS, Bottleneck, DilatedAttention, LoRA, MethodSpec, Prefix
from pelton.registry import require
from pelton.tuner.given import (
    check_task,
    parse_gate,
    parse_method,
    parse_methods,
    parse_names,
    refused_arguments,
    settled,
)
from pelton.tuner.register import PELTON
from pelton.tuner.store import Step, load_steps, save_steps

MethodLike = MethodSpec | str | Mapping[str, Any]
GateLike = GateSpec | str | Mapping[str, Any]

Stage = Literal["pretrain", "finetune"]

WEIGHTS = "adapter_model.safetensors"


class Common(TypedDict, total=False):
    """The keyword arguments that all ways to make a PeltonConfig share."""

    task_type: str | None
    modules_to_save: list[str] | None
    inference_mode: bool
    base_model_name_or_path: str | None
    revision: str | None


def default_methods() -> tuple[MethodSpec, ...]:
    """Returns the recommended methods: LoRA on all of attention and the feed-forward input, and a bottleneck behind it.

    LoRA on the feed-forward output is left to the bottleneck, which stands there: its input is the widest tensor of a
    block, and reading it once more costs as much as the other sites together (`docs/design-notes.md`).
    """
    return (LoRA(sites=("attn.q", "attn.k", "attn.v", "attn.out", "ffn.in")), Bottleneck())


def default_gate() -> GateSpec:
    """Returns the recommended gate: every method by itself, and nearly open from the start.

    Gates that compete begin by dividing every method by their number, which costs more than they win
    (`docs/design-notes.md`).
    """
    return MLPGate(activation="sigmoid", init=0.9)


@dataclasses.dataclass
class PeltonConfig(PeftConfig, Strict):  # type: ignore[misc]  # peft is not typed
    """What is put into every block, and the gate that opens it.

    `PeltonConfig(task_type=…)` alone is the recommended default: LoRA and a bottleneck under an open `MLPGate`.

    Attributes:
        methods: specs, kinds ("lora") or mappings ({"kind": "lora", "rank": 4}), each kind once. None means the default
            two, at those of their sites that a backbone has.
        gate: a spec, a kind or a mapping.
        modules_to_save: names of other modules to train and save whole, such as a head.
        backbone: the model type and the widths of the blocks the adapter was made for; filled in when it is attached.
        pruned: by block number, the kinds of methods that are gone from it; filled in by `pelton.prune`.
        folded: which weights of the backbone hold the rest of the adapter, and their hash; filled in by `pelton.fold`.
        sizes: by block number, kind and place ("0.lora.attn_v"), how many units a shrunk part has left; likewise.
    """

    methods: Sequence[MethodLike] | None = None
    gate: GateLike = dataclasses.field(default_factory=default_gate)
    modules_to_save: list[str] | None = None
    backbone: dict[str, Any] | None = None
    pruned: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    folded: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Turns names and mappings into specs and checks the list."""
        check_task(self.task_type)
        super().__post_init__()
        self.peft_type = PELTON
        self.saved: frozenset[str] | None = None  # of a config that was read: the tensors beside it, if it was a folder
        self.steps: tuple[Step, ...] = ()  # what made the adapter smaller, and the way back
        self.gate = parse_gate(self.gate)
        if isinstance(self.gate, FixedGate):
            for ratio in self.gate.table.values():
                for kind in ratio if isinstance(ratio, Mapping) else ():
                    METHODS[kind]  # an unknown kind is an error that names the nearest
        self.modules_to_save = parse_names(self.modules_to_save)
        require(isinstance(self.pruned, Mapping), "pruned is by block number", pruned=self.pruned)
        require(isinstance(self.sizes, Mapping), "sizes are by block, kind and place", sizes=self.sizes)
        for kind in [kind for kinds in self.pruned.values() for kind in kinds]:
            METHODS[kind]
        self.methods = None if self.methods is None else parse_methods(self.methods)

    @classmethod
    def refusal(cls, names: Sequence[str]) -> UnknownArgument:
        """Builds the error for arguments that do not exist; says which method or gate has them."""
        return refused_arguments(cls, names)

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The methods as specs; the default ones where none were named."""
        return default_methods() if self.methods is None else cast(tuple[MethodSpec, ...], self.methods)

    def pruned_from(self, index: int) -> frozenset[str]:
        """Returns the kinds of methods that are gone from a block."""
        return frozenset(self.pruned.get(str(index), ()))

    @property
    def gate_spec(self) -> GateSpec:
        """The gate as a spec."""
        return cast(GateSpec, self.gate)

    @classmethod
    def unipelt(cls, **common: Unpack[Common]) -> Self:
        """The paper's UniPELT (APL): bottleneck 48, prefix 10, LoRA 8, linear gates (Mao et al., ACL 2022)."""
        lora = LoRA(rank=8, alpha=8)
        return cls(**settled([lora, Bottleneck(bottleneck_size=48), _published_prefix()], LinearGate(), common))

    @classmethod
    def unipelt_ap(cls, **common: Unpack[Common]) -> Self:
        """The paper's UniPELT (AP), without LoRA."""
        return cls(**settled([Bottleneck(bottleneck_size=48), _published_prefix()], LinearGate(), common))

    @classmethod
    def dilated(
        cls,
        method: DilatedAttention | None = None,
        *,
        stage: Stage = "pretrain",
        pretrain_dilated_ratio: float = 0.01,
        finetune_dilated_ratio: float = 0.01,
        others: Sequence[MethodLike] = (),
        **common: Unpack[Common],
    ) -> Self:
        """Dilated attention beside the original at fixed ratios, which `pelton.set_stage` switches between.

        Args:
            method: the dilated attention; the default one when not given.
            stage: "pretrain" or "finetune".
            pretrain_dilated_ratio: the dilated attention's share of the output then; the original has the rest.
            finetune_dilated_ratio: likewise.
            others: methods that work beside it, their gates fixed at 1.
            **common: what all ways to make a config take.
        """
        ratios = {"pretrain": pretrain_dilated_ratio, "finetune": finetune_dilated_ratio}
        for name, ratio in ratios.items():
            known = isinstance(ratio, int | float) and 0 <= ratio <= 1
            require(known, f"0 <= {name}_dilated_ratio <= 1", **{f"{name}_dilated_ratio": ratio})
        first = DilatedAttention() if method is None else parse_method(method)
        require(isinstance(first, DilatedAttention), "method is a DilatedAttention", method=method)
        specs = parse_methods([first, *(parse_methods(others) if others else ())])
        rows = {name: dict.fromkeys((s.kind for s in specs), 1.0) | {"dilated": r} for name, r in ratios.items()}
        return cls(**settled(specs, FixedGate(stages=rows, stage=stage), common))

    @classmethod
    def from_backbone(cls, config: Any, method: DilatedAttention | None = None, **common: Unpack[Common]) -> Self:
        """The dilated attention that a backbone's own config asks for, as Recon's does.

        Args:
            config: has `use_dilated`, `task_type` ("pretrain" or "finetune") and the two ratios of `dilated`.
            method: as in `dilated`.
            **common: what all ways to make a config take.

        Raises:
            SpecError: the config asks for none, or a ratio breaks a law.
        """
        if not getattr(config, "use_dilated", False):
            kind = getattr(config, "model_type", type(config).__name__)
            raise SpecError(
                f"`use_dilated` must hold in the backbone's config, but that of {kind!r} does not ask for dilated "
                "attention. Set use_dilated=True in it, or use PeltonConfig.dilated()."
            )
        return cls.dilated(
            method,
            stage=config.task_type,
            pretrain_dilated_ratio=config.pretrain_dilated_ratio,
            finetune_dilated_ratio=config.finetune_dilated_ratio,
            **common,
        )

    @classmethod
    def single(cls, method: MethodLike, **common: Unpack[Common]) -> Self:
        """One plain method, its gate fixed at 1."""
        return cls(**settled([method], FixedGate(1.0), common))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; every spec with its kind."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["methods"] = None if self.methods is None else [m.to_dict() for m in self.specs]
        values["gate"] = self.gate_spec.to_dict()
        return values

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """Reads a saved config; a local folder's weights are checked first, so that nothing is attached in vain."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        saved: frozenset[str] = _check_folder(folder) if folder.is_dir() else frozenset()
        config = cast(Self, super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs))
        config.saved = saved
        config.steps = load_steps(folder)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the config, and beside it what passes took from the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        save_steps(self.steps, Path(save_directory))


def _published_prefix() -> Prefix:
    return Prefix(prefix_length=10, parametrisation="mlp", gating="scale")


def _check_folder(folder: Path) -> frozenset[str]:
    """Refuses a folder whose config or weights cannot be read, or whose weights are a pickle; names its tensors."""
    try:
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{folder}/adapter_config.json cannot be read: expected JSON, got {error}.") from error
    weights = folder / WEIGHTS
    if not weights.exists():
        there = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise AdapterError(
            f"{folder} holds no {WEIGHTS}; it holds {there}. Pelton reads safetensors only, never pickled weights "
            "(.bin, .pt): save the adapter again with save_pretrained."
        )
    try:
        with safe_open(weights, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{weights} is not a whole safetensors file ({weights.stat().st_size} bytes): {error}. "
            "Copy it again or save the adapter anew."
        ) from error
