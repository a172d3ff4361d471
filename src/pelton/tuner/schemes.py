"""How layers store their weight: one row of `SCHEMES` for each way, a table of functions.

A float weight is copied as it is. A quantised one is read by its library's own dequantiser and written by its own
quantiser, with the block size, type and range that it had. Libraries are recognised by the names of their classes, and
imported only where a layer of theirs is there.

Letters: O output features, I input features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn


def _nothing(layer: Any) -> str:
    return ""


@dataclass(frozen=True)
class Scheme:
    """One way that layers store their weight.

    Attributes:
        name: What it is called in messages.
        layers: Classes of layers, by module and name.
        weights: Classes of their weight, by package and name.
        read: Turns a weight that `keep` or `write` gave into float32 [O, I], a copy.
        write: Returns values [O, I] as the layer stores them; changes nothing.
        exact: Whether what is written is what was wanted, to the precision of the weight's dtype.
        keep: Returns a layer's weight as it is stored, with all that reading it takes.
        parts: Returns the plain tensors that tell a layer's weight from another one, whatever forwards do to it.
        settle: Tells a layer that it has another weight.
        objection: Says why a layer of this scheme cannot take another weight; empty where it can.
    """

    name: str
    layers: tuple[str, ...]
    weights: tuple[str, ...]
    read: Callable[[Any], Tensor]
    write: Callable[[Any, Tensor], Tensor]
    exact: bool = False
    keep: Callable[[Any], Tensor] = lambda layer: layer.weight
    parts: Callable[[Any], dict[str, Tensor]] = lambda layer: flat("weight", layer.weight)
    settle: Callable[[Any], object] = _nothing
    objection: Callable[[Any], str] = _nothing


def flat(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the plain tensors inside a tensor of a class of its own."""
    if type(tensor) in (Tensor, nn.Parameter):
        return {name: tensor}
    inner: dict[str, Tensor] = {}
    for part in cast(Any, tensor).__tensor_flatten__()[0]:
        inner |= flat(f"{name}.{part}", getattr(tensor, part))
    return inner


# ---- bitsandbytes: https://huggingface.co/docs/bitsandbytes ------------------------------------------------------


def _read_8bit(weight: Any) -> Tensor:
    values: Tensor = import_module("bitsandbytes.functional").int8_vectorwise_dequant(weight.data, weight.SCB)
    return values.float()


def _write_8bit(layer: Any, values: Tensor) -> Tensor:
    new = type(layer.weight)(values.cpu(), requires_grad=False, has_fp16_weights=False)
    return new.to(layer.weight.device)  # type: ignore[no-any-return]  # moving is what quantises


def _keep_8bit(layer: Any) -> Tensor:
    """Returns the weight with the scales [O] of its rows, which the first forward moves from it to the layer."""
    data, scale = layer.weight.data, layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    kept: Tensor = type(layer.weight)(data, requires_grad=False, CB=data, SCB=scale)
    return kept


def _settle_8bit(layer: Any) -> None:
    layer.state.CB = layer.state.SCB = None  # the next forward takes them from the weight


def _mind_8bit(layer: Any) -> str:
    return "quantises at every forward: load it with has_fp16_weights=False" if layer.state.has_fp16_weights else ""


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Returns data and state of a 4-bit weight in the common layout; changes neither.

    On CPUs with bfloat16 the first forward repacks a weight for its kernels. What the library offers to undo that
    would quantise the scales a second time, or leave them transposed; here they stay the ones that are computed with.
    """
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    state = copy.copy(state)
    state.original_nested = False
    data, state = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()  # [I / block size, O] to one for each block
    return data, state


def _read_4bit(weight: Any) -> Tensor:
    values: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(*_unpacked(weight))
    return values.float()


def _write_4bit(layer: Any, values: Tensor) -> Tensor:
    old = layer.weight
    _, state = _unpacked(old)
    new = type(old)(
        values.to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=state.quant_type,
        quant_storage=old.quant_storage,
    )
    return new.to(old.device)  # type: ignore[no-any-return]


def _settle_4bit(layer: Any) -> None:
    layer.weight.module, layer.quant_state = layer, layer.weight.quant_state


def _mind_4bit(layer: Any) -> str:
    return "" if layer.weight.quant_state is not None else "is not quantised yet: move it to its device first"


# ---- torchao: https://docs.pytorch.org/ao ------------------------------------------------------------------------


def _dequantized(weight: Any) -> Tensor:
    values: Tensor = weight.detach().dequantize().float()
    return values


def _range(weight: Any) -> Any:
    """Returns whether the range of the integers lies around zero."""
    kinds = import_module("torchao.quantization.quant_primitives").MappingType
    centred = weight.zero_point is None or not bool(weight.zero_point.any())
    return kinds.SYMMETRIC if centred else kinds.ASYMMETRIC


def _write_int8(layer: Any, values: Tensor) -> Tensor:
    old = layer.weight
    grains, size = import_module("torchao.quantization.granularity"), list(old.block_size)
    if size == list(values.shape):
        grain = grains.PerTensor()
    else:
        grain = grains.PerRow() if size[-1] == values.shape[-1] else grains.PerGroup(size[-1])
    new: Tensor = type(old.data).from_hp(
        values.to(old.dtype),
        grain,
        mapping_type=_range(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        reduce_range=old.reduce_range,
    )
    return new


def _mind_int8(layer: Any) -> str:
    scaled = layer.weight.act_pre_scale is not None
    return "scales its input (SmoothQuant), which its weight undoes: keep the adapter attached" if scaled else ""


def _write_intx(layer: Any, values: Tensor) -> Tensor:
    old = layer.weight
    new: Tensor = type(old.data).from_hp(
        values.to(old.dtype),
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=_range(old),
        activation_quantization=old.activation_quantization,
    )
    return new


# ---- optimum-quanto: https://github.com/huggingface/optimum-quanto -----------------------------------------------


def _write_quanto(layer: Any, values: Tensor) -> Tensor:
    twin = object.__new__(type(layer))  # quantises a float weight by the layer's own settings
    twin.__dict__ = layer.__dict__ | {"_parameters": {"weight": nn.Parameter(values.to(layer.weight.dtype))}}
    with torch.no_grad():
        new: Tensor = twin.qweight
    return new


def _mind_quanto(layer: Any) -> str:
    whole = layer.activation_qtype is None
    return "" if whole else "quantises activations too, which nothing is known of: keep the adapter attached"


FLOAT = ("torch.Parameter",)
BITSANDBYTES, LINEAR = "bitsandbytes.nn.modules", "torch.nn.modules.linear"

SCHEMES = (
    Scheme(
        "nn.Linear",
        (f"{LINEAR}.Linear", f"{LINEAR}.NonDynamicallyQuantizableLinear"),
        FLOAT,
        read=lambda weight: weight.detach().float().clone(),
        write=lambda layer, values: values,
        exact=True,
    ),
    Scheme(
        "Conv1D",
        ("transformers.pytorch_utils.Conv1D",),
        FLOAT,
        read=lambda weight: weight.detach().float().t().clone(memory_format=torch.contiguous_format),
        write=lambda layer, values: values.t(),
        exact=True,
    ),
    Scheme(
        "bitsandbytes 8-bit",
        (f"{BITSANDBYTES}.Linear8bitLt",),
        ("bitsandbytes.Int8Params",),
        read=_read_8bit,
        write=_write_8bit,
        keep=_keep_8bit,
        parts=lambda layer: {"weight": layer.weight.data, "scale": _keep_8bit(layer).SCB},  # type: ignore[attr-defined]
        settle=_settle_8bit,
        objection=_mind_8bit,
    ),
    Scheme(
        "bitsandbytes 4-bit",
        tuple(f"{BITSANDBYTES}.{name}" for name in ("Linear4bit", "LinearNF4", "LinearFP4")),
        ("bitsandbytes.Params4bit",),
        read=_read_4bit,
        write=_write_4bit,
        parts=lambda layer: {"weight": _unpacked(layer.weight)[0]},
        settle=_settle_4bit,
        objection=_mind_4bit,
    ),
    Scheme(
        "torchao int8",
        (f"{LINEAR}.Linear",),
        ("torchao.Int8Tensor",),
        read=_dequantized,
        write=_write_int8,
        objection=_mind_int8,
    ),
    Scheme(
        "torchao intx",
        (f"{LINEAR}.Linear",),
        ("torchao.IntxUnpackedToInt8Tensor",),
        read=_dequantized,
        write=_write_intx,
    ),
    Scheme(
        "quanto",
        ("optimum.quanto.nn.qlinear.QLinear",),
        ("optimum.WeightQBytesTensor", "optimum.WeightQBitsTensor"),
        read=_dequantized,
        write=_write_quanto,
        objection=_mind_quanto,
    ),
)
