"""Registering with PEFT and transformers without importing them: at once where they are loaded, else right after.

They bring torch along, seconds that `import pelton` and `pelton --help` should not cost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _method(peft: ModuleType) -> None:
    import_module("pelton.tuner")  # registers itself


def _models(configuration_auto: ModuleType) -> None:
    import_module("pelton.models").announce(configuration_auto)


AFTER: dict[str, Callable[[ModuleType], None]] = {
    "peft": _method,
    "transformers.models.auto.configuration_auto": _models,
}
"""What happens as soon as a module has been loaded."""


class _After(MetaPathFinder):
    """Finds a module as Python would, and has its row of the table done when it has loaded.

    It stays until then: transformers asks for PEFT's spec without loading it, to know whether it is installed.
    """

    def __init__(self, waited: str) -> None:
        self.waited = waited

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.waited:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that does what is to be done after what it loads."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        name = module.__spec__.name
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not (isinstance(f, _After) and f.waited == name)]
        AFTER[name](module)


def register() -> None:
    """Sees to it that PEFT knows Pelton, and transformers its models, as soon as both are loaded."""
    for name, act in AFTER.items():
        if name in sys.modules:
            act(sys.modules[name])
        elif not any(isinstance(finder, _After) and finder.waited == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _After(name))
