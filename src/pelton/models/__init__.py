"""Two small reference models beside the pipeline, known to transformers' Auto classes by their model types.

Nothing here is imported before it is needed: transformers looks a config class up by its model type, in a module that
it imports then. `announce` puts Pelton's types into that table, with a stand-in for the module; the module itself
registers its models at its end, by `AutoModel.register` and the like. To add a model, add a row.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

MODELS = {
    "minigpt": ("pelton.models.minigpt", "MiniGPTConfig"),
    "recon": ("pelton.models.recon", "ReconConfig"),
}
"""Model type → its module, and the name of its config class there."""


class _Later(ModuleType):
    """Stands for a module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def announce(auto: Any) -> None:
    """Tells `AutoConfig` which model types there are, without importing them.

    Args:
        auto: the loaded module `transformers.models.auto.configuration_auto`.
    """
    for model_type, (home, config) in MODELS.items():
        auto.CONFIG_MAPPING_NAMES[model_type] = config
        auto.CONFIG_MAPPING._modules[auto.model_type_to_module_name(model_type)] = _Later(home)
