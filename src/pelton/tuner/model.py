"""PeltonModel: the PEFT tuner. It puts one gated block beside the modules of every transformer block.

PEFT calls it to add, switch, save, load, merge and remove adapters. What a block does with them is in `block.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, set_additional_trainable_modules
from torch import nn
from torch.utils.hooks import RemovableHandle

from pelton.anatomy import find_anatomy
from pelton.errors import AdapterError
from pelton.gates.penalties import wanted
from pelton.tuner.atomic import as_before
from pelton.tuner.block import GatedBlock
from pelton.tuner.checkpoint import CheckpointKeys, check_folded, check_heads, check_names
from pelton.tuner.config import PeltonConfig
from pelton.tuner.merge import check_foldable, check_untied, fold_block
from pelton.tuner.penalise import GatePenalty, attach_penalties
from pelton.tuner.plan import BlockPlan, bind_parts, device_of, fingerprint, fitting_methods, make_plan
from pelton.tuner.quantised import lost
from pelton.tuner.register import PREFIX
from pelton.tuner.routing import routed_batch
from pelton.tuner.taps import Taps

CHILD = "pelton"
"""The name of the gated block among the children of a transformer block."""


class PeltonModel(CheckpointKeys, BaseTuner):  # type: ignore[misc]  # peft is not typed
    """Gated methods in every block of a backbone.

    Attributes:
        model: the backbone; its modules, names and weights are not changed.
        peft_config: the configs by adapter name.
        penalty_factor: what the gate penalties are multiplied by; a state of this model object, not saved.
        penalty_taker: whom they go to instead of `outputs.loss`; see `gate_penalty`.
    """

    prefix = PREFIX
    tuner_layer_cls = GatedBlock
    targeted_module_names: list[str]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads it from the class
    penalty_hooks: tuple[RemovableHandle, ...] = ()
    penalty_factor: float = 1.0
    penalty_taker: GatePenalty | None = None
    requiring: list[tuple[nn.Parameter, bool]]
    awaited: str | None = None  # the adapter whose saved weights are still to come

    def blocks(self) -> Iterator[GatedBlock]:
        """Yields the gated blocks, in the order of the model."""
        for module in self.model.modules():
            if isinstance(module, GatedBlock):
                yield module

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Adds an adapter to the backbone. Everything is planned and built before the model is touched.

        Args:
            model: the backbone.
            adapter_name: under which name.
            autocast_adapter_dtype: PEFT's switch; adapter weights are float32 in any case.
            low_cpu_mem_usage: build on the meta device, to be filled by loading.
            state_dict: PEFT's hint where the adapter goes; the config says it already.
        """
        config = self.peft_config[adapter_name]
        context: AbstractContextManager[Any] = init_empty_weights() if low_cpu_mem_usage else nullcontext()
        try:
            anatomy = find_anatomy(model)
            check_heads(model, config)
            check_folded(model, config)
            config = copy.copy(config)
            config.methods = fitting_methods(config, anatomy)  # saved so: the default may be another one by then
            with context:
                plans = make_plan(config, anatomy)
                bind_parts(plans, model)
            check_names(list(self.peft_config), plans)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self.peft_config[adapter_name] = config
        config.backbone = fingerprint(anatomy)
        self.awaited = adapter_name if config.saved is not None else None
        self.requiring = [(p, p.requires_grad) for p in model.parameters()]
        for plan in plans:
            parent = model.get_submodule(plan.block.name)
            self._create_and_replace(config, adapter_name, parent, CHILD, parent, plan.block.name, plan=plan)
        if wanted(config.gate_spec) and not self.penalty_hooks:
            self.penalty_hooks = attach_penalties(self, model)
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *(p.block.name for p in plans)]))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(model),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        if len(self.peft_config) > 1:
            self._require_as_before()

    def _create_and_replace(
        self,
        peft_config: PeltonConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        plan: BlockPlan,
    ) -> None:
        """Adds one adapter to one transformer block; the first one makes the gated block."""
        gated = getattr(parent, target_name, None)
        if gated is None:
            gated = GatedBlock(plan.block)
            gated.taps = Taps(gated, parent)
            parent.add_module(target_name, gated)
        gated.add(adapter_name, plan)
        gated.taps.connect(parent, adapter_name)
        device = device_of(parent, plan.block)
        if device.type != "meta" and not any(p.is_meta for p in gated.parameters()):
            gated.to(device)

    def _require_as_before(self) -> None:
        for parameter, requires_grad in self.requiring:
            parameter.requires_grad = requires_grad

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes one adapter, with the hooks that only it needed and the blocks that only it had.

        Raises:
            AdapterError: it is the last one and has a head, which PEFT would leave without any.
        """
        heads = any(isinstance(module, AuxiliaryTrainingWrapper) for module in self.model.modules())
        if heads and list(self.peft_config) == [adapter_name]:
            raise AdapterError(
                f"{adapter_name!r} is the last adapter, and its head cannot go alone. Call unload() for the plain one."
            )
        was_active = adapter_name in self.active_adapters
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        for path, block in list(self.named_blocks()):
            parent = self.model.get_submodule(path)
            block.taps.disconnect()
            if not block.wirings:
                delattr(parent, CHILD)
                continue
            block.taps = Taps(block, parent)
            for name in block.wirings:
                block.taps.connect(parent, name)
        if was_active:
            self.set_adapter(left or list(self.peft_config)[:1])

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT's way knows LoRA alone."""
        raise AdapterError("Adapters of several method kinds are combined with pelton.combine(model, …).")

    def take_off(self, adapter_name: str) -> None:
        """Removes an adapter that could not be loaded; everything is as it was before it came."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            self.unload()
        self._require_as_before()

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """PEFT's hook for mixed batches: `adapter_names` gives each row its adapter."""
        names = kwargs.get("adapter_names")
        if names is None:
            return nullcontext()
        if self.training:
            raise AdapterError("adapter_names is for inference, but the model is in training mode. Call model.eval().")
        given = kwargs.get("generation_config")
        counts = (kwargs.get(key) or getattr(given, key, None) or 1 for key in ("num_beams", "num_return_sequences"))
        return routed_batch(self, names, max(counts))

    def _check_merge_allowed(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raises AdapterError unless every part of the adapters folds exactly."""
        names = list(adapter_names or self.active_adapters)
        for name in names:
            if name not in self.peft_config:
                raise AdapterError(f"There is no adapter {name!r} to merge. There are: {', '.join(self.peft_config)}.")
        for path, block in self.named_blocks():
            check_foldable(block, self.model.get_submodule(path), names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused: weights are merged by `merge_and_unload`, or not at all."""
        raise AdapterError("Pelton merges in one step, without a way back: call merge_and_unload() on a copy.")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Removes the gated blocks; with `merge`, folds the adapters into the backbone's weights first.

        All folded weights are computed before the first one is written.
        """
        if merge:
            self._check_merge_allowed(adapter_names)
            names = list(adapter_names or self.active_adapters)
            changes = [
                change
                for path, block in self.named_blocks()
                for change in fold_block(block, self.model.get_submodule(path), names, check=safe_merge)
            ]
            check_untied(self.model, [change.parameter for change in changes])
            rounded = lost(change.rounding for change in changes)
            if rounded is not None:
                warnings.warn(f"Merging into quantised weights is not exact: {rounded}.", stacklevel=3)
            with as_before(self) as before:
                before.write(changes)
                return self._take_out(trained_heads=True)
        with as_before(self):
            return self._take_out(trained_heads=False)

    def unload_trained(self) -> nn.Module:
        """Removes the gated blocks, and leaves the trained heads in their places."""
        return self._take_out(trained_heads=True)

    def _take_out(self, trained_heads: bool) -> nn.Module:
        for path, block in list(self.named_blocks()):
            block.taps.disconnect()
            delattr(self.model.get_submodule(path), CHILD)
        for hook in self.penalty_hooks:
            hook.remove()
        self._unwrap_saved_modules(trained_heads)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return cast(nn.Module, self.model)

    def _unwrap_saved_modules(self, merge: bool) -> None:
        """Puts heads and other `modules_to_save` back, trained when merging, as they were otherwise."""
        wrapped = [(n, m) for n, m in self.model.named_modules() if hasattr(m, "unload_and_optionally_merge_module")]
        for name, module in wrapped:
            parent, _, child = name.rpartition(".")
            if not merge and isinstance(module, ModulesToSaveWrapper):
                plain = module.original_module  # PEFT would leave the trained copy
            else:
                plain = module.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
            setattr(self.model.get_submodule(parent), child, plain)

    def named_blocks(self) -> Iterator[tuple[str, GatedBlock]]:
        """Yields the gated blocks with the names of the transformer blocks that they stand in."""
        for name, module in self.model.named_modules():
            if isinstance(module, GatedBlock):
                yield name.removesuffix(f".{CHILD}"), module
