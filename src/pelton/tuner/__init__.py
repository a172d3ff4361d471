"""Pelton as a PEFT method: its config, its gated block, its tuner; the only code that touches peft."""

import pelton.tuner.peft_kinds  # noqa: F401 - registers the methods of PEFT
from pelton.tuner.block import GatedBlock
from pelton.tuner.config import PeltonConfig
from pelton.tuner.controls import gate_penalty, gated_blocks, set_methods, set_stage, set_temperature
from pelton.tuner.initialize import initialize_from_gradients
from pelton.tuner.model import PeltonModel
from pelton.tuner.peft_methods import Peft
from pelton.tuner.register import register
from pelton.tuner.summary import gate_summary

register(PeltonConfig, PeltonModel)

__all__ = [
    "GatedBlock",
    "Peft",
    "PeltonConfig",
    "PeltonModel",
    "gate_penalty",
    "gate_summary",
    "gated_blocks",
    "initialize_from_gradients",
    "set_methods",
    "set_stage",
    "set_temperature",
]
