"""What is trained: one file per method, each a frozen spec, its module, its formula and its source."""

from pelton.methods.base import LINEAR_SITES, METHODS, SITES, Grid, MethodSpec, Part, Shape, register_method
from pelton.methods.bitfit import BitFit
from pelton.methods.bottleneck import Bottleneck
from pelton.methods.dilated import DilatedAttention, DilatedPart
from pelton.methods.ia3 import IA3
from pelton.methods.lora import LoRA
from pelton.methods.prefix import Prefix, PrefixPart
from pelton.methods.view import View

__all__ = [
    "IA3",
    "LINEAR_SITES",
    "METHODS",
    "SITES",
    "BitFit",
    "Bottleneck",
    "DilatedAttention",
    "DilatedPart",
    "Grid",
    "LoRA",
    "MethodSpec",
    "Part",
    "Prefix",
    "PrefixPart",
    "Shape",
    "View",
    "register_method",
]
