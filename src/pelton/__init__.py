"""Gated parameter-efficient fine-tuning for Hugging Face Transformers.

Put LoRA, bottleneck adapters, prefixes, (IA)³ and BitFit into every block together, let gates learn which helps where.
Importing this module registers the method with PEFT: `peft.get_peft_model` and `PeftModel.from_pretrained` then know
it. Names are loaded when they are first used, so that importing costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pelton.registration import register
from pelton.version import __version__

if TYPE_CHECKING:
    from pelton.anatomy import find_anatomy
    from pelton.compress.combine import combine
    from pelton.compress.fold import fold, folded_loss, unfold
    from pelton.compress.freeze import freeze_gates
    from pelton.compress.importance import leave_one_out, taylor
    from pelton.compress.prune import prune
    from pelton.compress.shrink import shrink
    from pelton.compress.steps import revive
    from pelton.errors import PeltonError
    from pelton.export.onnx import to_onnx
    from pelton.export.peft import from_peft, to_peft
    from pelton.gates import FixedGate, FrozenGate, GumbelGate, LinearGate, MLPGate, ScalarGate, register_gate
    from pelton.gates.recording import GateLog, record_gates
    from pelton.insight.drift import GateDrift, gate_drift
    from pelton.insight.latency import Stopwatch
    from pelton.insight.monitor import DriftMonitor
    from pelton.methods import IA3, BitFit, Bottleneck, DilatedAttention, LoRA, Prefix, register_method
    from pelton.search.architecture import derive
    from pelton.search.plan import StudyPlan
    from pelton.search.recommend import recommend
    from pelton.search.study import Study
    from pelton.tuner import (
        Peft,
        PeltonConfig,
        gate_penalty,
        gate_summary,
        gated_blocks,
        initialize_from_gradients,
        set_methods,
        set_stage,
        set_temperature,
    )

_HOME = {
    "pelton.anatomy": ("find_anatomy",),
    "pelton.compress.combine": ("combine",),
    "pelton.compress.fold": ("fold", "folded_loss", "unfold"),
    "pelton.compress.freeze": ("freeze_gates",),
    "pelton.compress.importance": ("leave_one_out", "taylor"),
    "pelton.compress.prune": ("prune",),
    "pelton.compress.shrink": ("shrink",),
    "pelton.compress.steps": ("revive",),
    "pelton.errors": ("PeltonError",),
    "pelton.export.onnx": ("to_onnx",),
    "pelton.export.peft": ("from_peft", "to_peft"),
    "pelton.gates": ("FixedGate", "FrozenGate", "GumbelGate", "LinearGate", "MLPGate", "ScalarGate", "register_gate"),
    "pelton.gates.recording": ("GateLog", "record_gates"),
    "pelton.insight.drift": ("GateDrift", "gate_drift"),
    "pelton.insight.latency": ("Stopwatch",),
    "pelton.insight.monitor": ("DriftMonitor",),
    "pelton.methods": ("IA3", "BitFit", "Bottleneck", "DilatedAttention", "LoRA", "Prefix", "register_method"),
    "pelton.search.architecture": ("derive",),
    "pelton.search.plan": ("StudyPlan",),
    "pelton.search.recommend": ("recommend",),
    "pelton.search.study": ("Study",),
    "pelton.tuner": (
        "Peft",
        "PeltonConfig",
        "gate_penalty",
        "gate_summary",
        "gated_blocks",
        "initialize_from_gradients",
        "set_methods",
        "set_stage",
        "set_temperature",
    ),
}

__all__ = [
    "IA3",
    "BitFit",
    "Bottleneck",
    "DilatedAttention",
    "DriftMonitor",
    "FixedGate",
    "FrozenGate",
    "GateDrift",
    "GateLog",
    "GumbelGate",
    "LinearGate",
    "LoRA",
    "MLPGate",
    "Peft",
    "PeltonConfig",
    "PeltonError",
    "Prefix",
    "ScalarGate",
    "Stopwatch",
    "Study",
    "StudyPlan",
    "__version__",
    "combine",
    "derive",
    "find_anatomy",
    "fold",
    "folded_loss",
    "freeze_gates",
    "from_peft",
    "gate_drift",
    "gate_penalty",
    "gate_summary",
    "gated_blocks",
    "initialize_from_gradients",
    "leave_one_out",
    "prune",
    "recommend",
    "record_gates",
    "register_gate",
    "register_method",
    "revive",
    "set_methods",
    "set_stage",
    "set_temperature",
    "shrink",
    "taylor",
    "to_onnx",
    "to_peft",
    "unfold",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its home when it is first used."""
    for home, names in _HOME.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(home), name))
    raise AttributeError(f"module 'pelton' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__


register()
