"""The hooks that connect a gated block to the modules of its transformer block.

Each is a small object rather than a closure: copies and pickles of the model copy it with the gated block it holds.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pelton.errors import AnatomyError
from pelton.gates.pooling import padding_of, reads_padding
from pelton.tuner.attention import AttentionTap
from pelton.tuner.block import GatedBlock


class OpenAtAttention:
    """Opens the gates when the attention is called, from its input; runs before it."""

    def __init__(self, gated: GatedBlock, attention: nn.Module) -> None:
        """Looks up where the attention takes its mask."""
        self.gated = gated
        self.mask = gated.block.mask
        names = list(inspect.signature(attention.forward).parameters)
        self.first = names[0]
        self.position = names.index(self.mask) if self.mask else -1

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the hidden states [B, T, D] and the mask from the call."""
        x = args[0] if args else kwargs[self.first]
        mask = None
        if self.mask is not None:
            mask = args[self.position] if len(args) > self.position else kwargs.get(self.mask)
        if mask is not None and self.gated.block.pools and not reads_padding(mask, x.shape[1]):
            raise AnatomyError(
                f"{type(module).__name__} in {self.gated.block.name!r} has a mask {tuple(mask.shape)} for {x.shape[1]} "
                "tokens, from which padding cannot be told. Use a gate with granularity='token', or add a row with "
                "padding=None for this architecture to pelton.anatomy.rows."
            )
        self.gated.open(x, padding_of(mask, x.shape[1]))


class OpenAfterNorm:
    """Opens the gates from a norm's output, where the attention sees windows instead of examples."""

    def __init__(self, gated: GatedBlock) -> None:
        """Keeps the gated block."""
        self.gated = gated

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Takes the hidden states [B, T, D]."""
        self.gated.open(output, None)


class EditInput:
    """Applies the parts that edit a layer's input, and keeps it for parts elsewhere; runs before the layer."""

    def __init__(self, gated: GatedBlock, path: str) -> None:
        """Keeps the layer's name."""
        self.gated, self.path = gated, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the layer's arguments with the edited input."""
        self.gated.keep_input(self.path, args[0])
        return (self.gated.edit(self.path, "input", args[0], args[0]), *args[1:])


class EditOutput:
    """Applies the parts that edit a layer's output; runs after the layer."""

    def __init__(self, gated: GatedBlock, path: str) -> None:
        """Keeps the layer's name."""
        self.gated, self.path = gated, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the edited output."""
        return self.gated.edit(self.path, "output", output, args[0])


class Close:
    """Lets go of the gate values when the block is done."""

    def __init__(self, gated: GatedBlock) -> None:
        """Keeps the gated block."""
        self.gated = gated

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forgets what the forward left."""
        self.gated.close()


class Taps:
    """All hooks of one gated block; added as adapters need them, removed together."""

    def __init__(self, gated: GatedBlock, block: nn.Module) -> None:
        """Connects the gate and the end of the block."""
        self.gated = gated
        self.attention = block.get_submodule(gated.block.attention)
        self.handles: dict[tuple[str, str], RemovableHandle] = {}
        if gated.block.norm is not None:
            norm = block.get_submodule(gated.block.norm)
            self.handles["", "open"] = norm.register_forward_hook(OpenAfterNorm(gated))
        else:
            tap = OpenAtAttention(gated, self.attention)
            self.handles["", "open"] = self.attention.register_forward_pre_hook(tap, with_kwargs=True, prepend=True)
        self.handles["", "close"] = block.register_forward_hook(Close(gated), always_call=True)

    def connect(self, block: nn.Module, adapter: str) -> None:
        """Adds the hooks that an adapter needs and that are not there yet."""
        wiring = self.gated.wirings[adapter]
        wanted = set(wiring.edits) | {(path, "input") for path in wiring.origins}
        for path, edits in sorted(wanted - set(self.handles)):
            layer = block.get_submodule(path)
            if edits == "input":
                self.handles[path, edits] = layer.register_forward_pre_hook(EditInput(self.gated, path))
            else:
                self.handles[path, edits] = layer.register_forward_hook(EditOutput(self.gated, path))
        if any("attn" in spec.sites for spec in wiring.methods):
            AttentionTap.attach(self.gated, self.attention)

    def disconnect(self) -> None:
        """Removes every hook."""
        for handle in self.handles.values():
            handle.remove()
        self.handles = {}
        AttentionTap.detach(self.attention)
