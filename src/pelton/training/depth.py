"""How deep each parameter of a backbone lies: how many blocks of its stack stand above it.

The top block of a stack has depth 0, the lowest of L blocks L - 1, embeddings L. A stack is a sequence of blocks that
run one after the other: an encoder and a decoder are two, the stages of a hierarchical encoder are one.
"""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn

from pelton.anatomy import find_anatomy


def parameter_depths(model: nn.Module) -> dict[int, int]:
    """Returns the depth of each parameter, by its `id`.

    What stands outside of blocks is as deep as the block before it (a final norm: 0), or deepest where none is before
    it, or where its name says that it embeds: some models define embeddings behind their blocks.

    Raises:
        AnatomyError: the model has no blocks.
    """
    stacks: dict[str, list[str]] = defaultdict(list)
    for block in find_anatomy(model).blocks:
        stacks[re.sub(r"\.\d+(?=\.|$)", "", block.stack)].append(block.name)
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    depths = {}
    for name, parameter in model.named_parameters():
        near = _nearest(name, list(stacks.values()))
        found = next((len(b) - 1 - i for b in near for i, n in enumerate(b) if name.startswith(f"{n}.")), None)
        depths[id(parameter)] = _outside(name, near, places) if found is None else found
    return depths


def _nearest(name: str, stacks: list[list[str]]) -> list[list[str]]:
    """Returns the stacks whose path begins as a parameter's name does, for longest: several, where all share it."""
    shared = [_shared(name, blocks[0]) for blocks in stacks]
    return [blocks for blocks, count in zip(stacks, shared, strict=True) if count == max(shared)]


def _shared(name: str, other: str) -> int:
    count = 0
    for one, two in zip(name.split("."), other.split("."), strict=False):
        if one != two:
            break
        count += 1
    return count


def _outside(name: str, stacks: list[list[str]], places: dict[str, int]) -> int:
    place, deepest = places[name.rpartition(".")[0]], max(len(blocks) for blocks in stacks)
    if "embed" in name:
        return deepest
    before = [(places[n], len(b) - 1 - i) for b in stacks for i, n in enumerate(b) if places[n] < place]
    return max(before)[1] if before else deepest
