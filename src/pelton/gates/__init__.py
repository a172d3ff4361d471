"""How open each method is: one file per kind of gate, one function that pools, and the penalties."""

from pelton.gates.base import GATES, DynamicGateSpec, Gate, GateSpec, Place, StaticGate, register_gate
from pelton.gates.linear import LinearGate
from pelton.gates.mlp import MLPGate
from pelton.gates.static import FixedGate, FrozenGate, ScalarGate

__all__ = [
    "GATES",
    "DynamicGateSpec",
    "FixedGate",
    "FrozenGate",
    "Gate",
    "GateSpec",
    "LinearGate",
    "MLPGate",
    "Place",
    "ScalarGate",
    "StaticGate",
    "register_gate",
]
