"""Gated parameter-efficient fine-tuning for Hugging Face Transformers.

Put LoRA, bottleneck adapters, prefixes, (IA)³ and BitFit into every block together, let gates learn which helps where.
Importing this module registers the method with PEFT; `peft.get_peft_model` and `PeftModel.from_pretrained` then know it.
"""

from pelton.anatomy import find_anatomy
from pelton.errors import PeltonError
from pelton.gates import FixedGate, LinearGate, MLPGate, ScalarGate, register_gate
from pelton.gates.recording import GateLog, record_gates
from pelton.methods import IA3, BitFit, Bottleneck, LoRA, Prefix, register_method
from pelton.tuner import PeltonConfig, gate_summary, gated_blocks, set_methods, set_stage
from pelton.version import __version__

__all__ = [
    "IA3",
    "BitFit",
    "Bottleneck",
    "FixedGate",
    "GateLog",
    "LinearGate",
    "LoRA",
    "MLPGate",
    "PeltonConfig",
    "PeltonError",
    "Prefix",
    "ScalarGate",
    "__version__",
    "find_anatomy",
    "gate_summary",
    "gated_blocks",
    "record_gates",
    "register_gate",
    "register_method",
    "set_methods",
    "set_stage",
]
