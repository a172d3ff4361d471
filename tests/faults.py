"""Faults at any point: an exception before any line that runs inside Pelton, PEFT or torch's modules.

A pass is run once to see which lines it comes by, then again and again with a fault before one of them. What a model is
then is compared attribute by attribute: values, modules, hooks, modes, gradients wanted, configs.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

import pelton
from pelton.tuner.block import GatedBlock

HOMES = (
    str(Path(pelton.__file__).parent),
    str(Path(peft.__file__).parent),
    str(Path(nn.__file__).parent / "modules" / "module.py"),
)
"""Where faults happen; of torch's modules in what changes them."""

CHANGES = ("add_module", "register_forward_hook", "register_forward_pre_hook", "__setattr__", "__delattr__")
TWICE = tuple(str(Path(pelton.__file__).parent / name) for name in ("compress", "export", "tuner"))

Line = tuple[str, int]


class Fault(BaseException):
    """No `Exception`, as Ctrl-C is none."""


class Tracer:
    """Notes the lines that run, and raises before one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines, self.known = at, [], {}

    def __enter__(self) -> Tracer:
        gc.disable()  # a fault in what the collector calls would reach nobody
        self.gradients = torch.is_grad_enabled()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)
        gc.enable()
        torch.set_grad_enabled(self.gradients)  # `no_grad` itself may have been hit

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in self.known:
            self.known[name] = name.startswith(HOMES)
        if not self.known[name] or (name == HOMES[-1] and frame.f_code.co_name not in CHANGES):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                sys.settrace(None)
                raise Fault(f"before {frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


def lines_of(act: Callable[[], Any]) -> list[Line]:
    """The lines that an action comes by, in order."""
    with Tracer() as tracer:
        act()
    return tracer.lines


def points(lines: list[Line]) -> list[int]:
    """Every line as it first runs; those of passes also as they last run, when loops have nearly done their work."""
    first: dict[Line, int] = {}
    last: dict[Line, int] = {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *(number for (file, _), number in last.items() if file.startswith(TWICE))})


def some(numbers: list[int], count: int) -> list[int]:
    """So many of the numbers, evenly spread, the last among them."""
    return numbers[:: -max(1, -(-len(numbers) // count))]


def fault(act: Callable[[], Any], at: int) -> str | None:
    """Runs an action with a fault at a point; says where it was, or None when the action was done before."""
    try:
        with Tracer(at):
            act()
    except Fault as error:
        return str(error)
    return None


def look(model: nn.Module, same: bool = True) -> dict[str, Any]:
    """What a model is, for comparison.

    Args:
        same: Also which objects it is made of, such as the parameters that an optimiser holds.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}:{key}": value for key, value in _attributes(module, same)}
    for name, parameter in model.named_parameters():
        found[f"{name} learns"] = parameter.requires_grad
        found[f"{name} is"] = (id(parameter), parameter.data_ptr()) if same else parameter.shape
    return found | {name: value.clone() for name, value in model.state_dict().items()}


def _attributes(module: nn.Module, same: bool) -> Iterator[tuple[str, Any]]:
    yield "type", type(module)
    for key, value in sorted(vars(module).items()):
        if key.endswith(("hooks", "_kwargs", "_called")) and isinstance(value, dict):
            yield key, [type(hook) for hook in value.values()]
        elif key == "_modules":
            yield key, list(value)
        if key in ("_values", "_inputs"):  # what a forward leaves for a moment
            yield key, len(value)
        elif same and key != "_batch":
            held = value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ()
            yield f"{key} is", (id(value), [(number, id(one)) for number, one in held])
    yield "training", module.training
    if isinstance(module, BaseTuner):
        yield "active", list(module.active_adapters)
        yield "configs", {name: (c.to_dict(), len(c.steps)) for name, c in module.peft_config.items()}
    if isinstance(module, GatedBlock):
        yield "wirings", dict(module.wirings)
        yield "handles", [(key, handle.id if same else 0) for key, handle in module.taps.handles.items()]
    implementation = getattr(vars(module).get("config"), "_attn_implementation", None)
    yield "attention", implementation


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same; their order counts too."""
    if list(one) != list(other):
        return sorted(set(one) ^ set(other)) or ["the order"]
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name])
    ]


class Bench:
    """A model, a pass over it, and what both are to be looked at by."""

    def __init__(
        self,
        make: Callable[[], tuple[nn.Module, Callable[[], Any]]],
        out: Callable[[nn.Module], Tensor],
        warm: bool = False,
    ) -> None:
        self.make, self.out = make, out
        if not warm:
            make()[1]()  # what runs once in a process is done then
        self.model, self.act = make()
        self.lines = lines_of(self.act)
        self.done = look(self._backbone(), same=False)
        self._anew()

    def _backbone(self) -> nn.Module:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _anew(self) -> None:
        self.model, self.act = self.make()
        self.said = self.out(self.model)
        self.before = look(self.model)

    def check(self, at: Iterable[int]) -> tuple[list[int], list[int]]:
        """Tries the pass with a fault at each point; after it nothing or everything is done.

        Returns:
            The points where nothing was done, and those where everything was.
        """
        nothing: list[int] = []
        everything: list[int] = []
        for number in at:
            where = fault(self.act, number)
            if where is None:
                self._anew()
                continue
            wrong = differences(self.before, look(self.model))
            if not wrong:
                nothing.append(number)
                continue
            assert not differences(self.done, look(self._backbone(), same=False)), (where, wrong[:5])
            everything.append(number)
            self._anew()
        assert torch.equal(self.said, self.out(self.model))
        return nothing, everything


# ---- full disks --------------------------------------------------------------------------------------------------


class _Disk:
    """Counts what is written, and fails once."""

    at: int | None = None
    count = 0
    watched = ""

    def write(self, path: Any) -> None:
        if self.at is None or not str(path).startswith(self.watched):
            return
        self.count += 1
        if self.count - 1 == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.at is None:
            return
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        made = event == "os.mkdir" and not Path(arguments[0]).is_dir()  # to see whether it is there
        if opened or made:
            self.write(arguments[0])
        elif event == "os.rename":
            self.write(arguments[1])


DISK = _Disk()
sys.addaudithook(DISK.audit)


@contextmanager
def full_disk(folder: Path, at: int) -> Iterator[_Disk]:
    """Inside, the so-manyth time fails that a file is opened for writing, made or moved under a folder."""
    serialize, parquet = safetensors.torch.serialize_file, pd.DataFrame.to_parquet

    def save(tensors: Any, path: Any, *more: Any, **options: Any) -> Any:
        DISK.write(path)
        return serialize(tensors, path, *more, **options)

    def table(frame: Any, path: Any, *more: Any, **options: Any) -> Any:
        DISK.write(path)
        return parquet(frame, path, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "serialize_file", save)
        patch.setattr(pd.DataFrame, "to_parquet", table)
        DISK.at, DISK.count, DISK.watched = at, 0, str(folder)
        try:
            yield DISK
        finally:
            DISK.at = None


def files(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder; None stands for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
