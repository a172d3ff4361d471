"""What is trained: one file per method, each a frozen spec, its module, its formula and its source."""

from pelton.methods.base import LINEAR_SITES, METHODS, SITES, MethodSpec, Part, Shape, register_method
from pelton.methods.bitfit import BitFit
from pelton.methods.bottleneck import Bottleneck
from pelton.methods.ia3 import IA3
from pelton.methods.lora import LoRA
from pelton.methods.prefix import Prefix, PrefixPart

__all__ = [
    "IA3",
    "LINEAR_SITES",
    "METHODS",
    "SITES",
    "BitFit",
    "Bottleneck",
    "LoRA",
    "MethodSpec",
    "Part",
    "Prefix",
    "PrefixPart",
    "Shape",
    "register_method",
]
