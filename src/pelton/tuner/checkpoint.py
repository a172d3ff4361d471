"""How PEFT writes and reads the keys of an adapter, and what is refused before a weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from pelton.errors import AdapterError
from pelton.tuner.quantised import stored
from pelton.tuner.store import digest

if TYPE_CHECKING:
    from pelton.tuner.config import PeltonConfig
    from pelton.tuner.plan import BlockPlan

_CONTAINERS = (".pelton.gates.", ".pelton.methods.")


class CheckpointKeys:
    """The classmethods of PEFT's `BaseTuner` that map keys, for parts that lie deeper than PEFT's own do."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Turns `….pelton.methods.default.lora.attn_q.A` into `….pelton.methods.lora.attn_q.A`."""
        for container in _CONTAINERS:
            head, found, tail = key.partition(container + adapter_name + ".")
            if found:
                return head + container + tail
        return super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[misc,no-any-return]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeltonConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gives checkpoint keys the adapter's name, after checking that every tensor is there and fits.

        Raises:
            AdapterError: a tensor is missing, left over or of another shape. An adapter that came with these weights is
                taken off again; one that was there before keeps its own.
        """
        remapped = super()._remap_adapter_state_dict_for_load(  # type: ignore[misc]
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        tuner = cast(Any, getattr(model, "base_model", model))
        try:
            _check_fit(model, adapter_name, remapped)
        except AdapterError:
            if tuner.awaited == adapter_name:
                tuner.take_off(adapter_name)
            raise
        tuner.awaited = None
        return remapped  # type: ignore[no-any-return]


def check_heads(model: nn.Module, config: PeltonConfig) -> None:
    """Refuses a saved adapter without the tensors of a head that it trained, where PEFT would stop half-way.

    Raises:
        AdapterError: a module that `modules_to_save` names is not in the file.
    """
    if not config.saved:
        return
    for name, module in model.named_modules():
        if not any(name.endswith(target) for target in config.modules_to_save or ()):
            continue
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for key in inner.state_dict():
            if not any(saved.endswith(f"{name}.{key}") for saved in config.saved):
                raise AdapterError(
                    f"The adapter trains {name!r}, but its file lacks {name}.{key}. Save it again with save_pretrained."
                )


def check_folded(model: nn.Module, config: PeltonConfig) -> None:
    """Refuses an adapter whose other half is in the weights of another backbone than this one.

    Raises:
        AdapterError: the weights that methods were folded into are not here, or have other values.
    """
    if config.folded is None:
        return
    here, names = dict(model.named_parameters()), [str(name) for name in config.folded["weights"]]
    if not all(name in here for name in names) or digest(stored(model, names)) != config.folded["digest"]:
        kinds = ", ".join(sorted({str(here[name].dtype).removeprefix("torch.") for name in names if name in here}))
        raise AdapterError(
            "Part of this adapter was folded into a backbone's weights, and this backbone does not have them. Load the "
            f"backbone that was saved when it was folded, in the precision that it has there (here: {kinds or 'none'})."
        )


def check_names(names: Sequence[str], plans: Sequence[BlockPlan]) -> None:
    """Refuses adapter names that are also components of adapters' keys.

    PEFT leaves other adapters out of a saved one by looking for their names anywhere in a key.
    """
    taken = {"gates", "methods", "base_model", "model", "pelton"}
    for plan in plans:
        taken.update(plan.block.name.split("."))
        modules: list[tuple[str, nn.Module]] = [("", plan.gate)]
        modules += [(f"{kind}.{key}", part) for kind, parts in plan.parts.items() for key, part in parts.items()]
        for path, module in modules:
            taken.update(path.split("."), *(key.split(".") for key in module.state_dict()))
    for name in names:
        if not name or "." in name or name in taken:
            raise AdapterError(
                f"An adapter cannot be named {name!r}: parts of the model or of adapters are, and PEFT tells their "
                "weights apart by these names. Choose another one."
            )


def _check_fit(model: nn.Module, adapter: str, found: dict[str, torch.Tensor]) -> None:
    here = model.state_dict()
    missing = sorted(k for k in here if any(f"{c}{adapter}." in k for c in _CONTAINERS) and k not in found)
    left = sorted(k for k in found if k not in here)
    problems = [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
    if left:
        problems.append(f"{len(left)} tensors have no place, such as {left[0]}")
    for key in sorted(set(found) & set(here)):
        if here[key].shape != found[key].shape:
            problems.append(f"{key} is {tuple(found[key].shape)} in the file, {tuple(here[key].shape)} in the model")
            break
    if problems:
        raise AdapterError(
            f"The weights do not fit adapter {adapter!r}: {'; '.join(problems)}. The adapter was saved for another "
            "architecture, size or configuration; nothing was loaded."
        )
