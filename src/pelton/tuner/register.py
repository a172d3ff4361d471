"""Making Pelton known to PEFT: its name in the enum of methods, its config and its tuner in PEFT's tables.

`register_peft_method` takes only names that are members of `PeftType`, so the member is added first. This is the one
place that reaches into PEFT's enum.
"""

from __future__ import annotations

from typing import Any, cast

from peft import PeftType
from peft.utils import register_peft_method


def _member() -> Any:
    if "PELTON" not in PeftType.__members__:
        member = str.__new__(cast(Any, PeftType), "PELTON")
        member._name_ = member._value_ = "PELTON"
        member.__objclass__ = PeftType
        PeftType._member_map_["PELTON"] = member
        PeftType._member_names_.append("PELTON")
        PeftType._value2member_map_["PELTON"] = member
        type.__setattr__(PeftType, "PELTON", member)
    return PeftType["PELTON"]


PELTON = _member()
"""`PeftType.PELTON`."""

PREFIX = "pelton."
"""PEFT's unique prefix of the method: `….pelton.methods.lora.attn_q.A` is saved, and gets its adapter's name behind the
next word, `….pelton.methods.default.lora.attn_q.A`, also where transformers loads it without PEFT's model."""


def register(config: type, tuner: type) -> None:
    """Registers the config and tuner classes under PEFT's name for Pelton."""
    register_peft_method(name="pelton", config_cls=config, model_cls=tuner, prefix=PREFIX)
