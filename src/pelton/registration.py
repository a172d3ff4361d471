"""Registering with PEFT without importing it: at once where PEFT is loaded, else right after it will be.

PEFT brings torch and transformers along, seconds that `import pelton` and `pelton --help` should not cost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as Python would, and has it register Pelton when it has loaded.

    It stays until then: transformers asks for PEFT's spec without loading it, to know whether it is installed.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that imports `pelton.tuner`, which registers Pelton, after what it loads."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterPeft)]
        import_module("pelton.tuner")


def register_with_peft() -> None:
    """Sees to it that PEFT knows Pelton as soon as both are loaded."""
    if "peft" in sys.modules:
        import_module("pelton.tuner")
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
