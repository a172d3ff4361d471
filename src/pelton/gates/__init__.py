"""How open each method is: one file per kind of gate, one function that pools, and the penalties."""

from pelton.gates.base import GATES, DynamicGateSpec, Gate, GateSpec, Place, StaticGate, register_gate
from pelton.gates.gumbel import GumbelGate, GumbelGateModule
from pelton.gates.linear import LinearGate
from pelton.gates.mlp import MLPGate, MLPGateModule
from pelton.gates.static import FixedGate, FrozenGate, ScalarGate

Tempered = GumbelGate | MLPGate
"""Gates that have a temperature."""

TemperedModule = GumbelGateModule | MLPGateModule
"""Their modules."""

__all__ = [
    "GATES",
    "DynamicGateSpec",
    "FixedGate",
    "FrozenGate",
    "Gate",
    "GateSpec",
    "GumbelGate",
    "GumbelGateModule",
    "LinearGate",
    "MLPGate",
    "MLPGateModule",
    "Place",
    "ScalarGate",
    "StaticGate",
    "Tempered",
    "TemperedModule",
    "register_gate",
]
