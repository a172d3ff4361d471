"""The public surface, the direction of imports, and what Pelton relies on inside PEFT."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_tuner_state_dict_key_prefixes
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

import pelton
from law import METHODS, attached, together, wake
from pelton.tuner import PeltonConfig
from pelton.tuner.block import GatedBlock
from pelton.tuner.model import PeltonModel
from pelton.tuner.register import PELTON, _member
from zoo import ARCHS

SOURCE = Path(pelton.__file__).parent

# The public names


def _order(name: str) -> tuple[int, str]:
    """CONSTANTS, Classes, functions, each by the alphabet."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_sorted_and_complete() -> None:
    assert pelton.__all__ == sorted(pelton.__all__, key=_order)
    assert len(set(pelton.__all__)) == len(pelton.__all__)
    offered = {name for names in pelton._HOME.values() for name in names} | {"__version__"}
    assert offered == set(pelton.__all__)
    assert dir(pelton) == sorted(pelton.__all__)


def test_type_checkers_see_what_is_there() -> None:
    """The names imported for type checkers are those that are loaded when used, from the same homes."""
    seen: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse((SOURCE / "__init__.py").read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                seen.setdefault(str(statement.module), set()).update(a.name for a in statement.names)
    assert seen == {home: set(names) for home, names in pelton._HOME.items()}


@pytest.mark.parametrize("name", pelton.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(pelton, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert inspect.getdoc(value), name
    first = inspect.getdoc(value).splitlines()[0]
    assert len(first) > 15
    assert not first.startswith(f"{name}("), "a dataclass without a docstring of its own"
    if inspect.isclass(value):
        own = [m for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")]
        assert all(inspect.getdoc(m) for m in own)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pelton' has no attribute 'LORA'"):
        _ = pelton.LORA


# Imports

LAYERS = [
    {"version", "errors", "registration"},
    {"arguments"},
    {"registry"},
    {"methods", "gates"},
    {"anatomy"},
    {"tuner"},
    {"tasks"},
    {"training"},
    {"insight"},
    {"bench"},
    {"compress"},
    {"search"},
    {"export"},
    {"serving"},
    {"cli", "dashboard"},
    {"__main__"},
]
"""Packages from the ground up; those in one layer do not import each other."""

RANK = {name: number for number, names in enumerate(LAYERS) for name in names}
BESIDE = {"models"}
"""Packages that stand beside the pipeline: nothing of it imports them, and they import nothing of it but the errors."""


def _imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Yields what a module imports of Pelton, at its top or in functions; imports for type checkers do not run."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child)
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pelton")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "pelton":
                yield from (f"pelton.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("pelton."):
                for alias in node.names:
                    submodule = SOURCE.joinpath(*node.module.split(".")[1:], f"{alias.name}.py").exists()
                    yield f"{node.module}.{alias.name}" if submodule else node.module


def _modules() -> dict[str, set[str]]:
    """The modules of Pelton, each with the modules it imports."""
    files: dict[str, Path] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set(_imports(ast.parse(path.read_text(encoding="utf-8")), name))
        found[name] = {t for t in targets if t in files and t != name}
    return found


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_package_has_its_place() -> None:
    assert {_package(m) for m in _modules()} - {""} <= set(RANK) | BESIDE


def test_imports_point_one_way() -> None:
    backwards = [
        f"{module} imports {target}"
        for module, targets in _modules().items()
        for target in targets
        if _package(module) and _package(module) != _package(target)
        if not (_package(module) in BESIDE and target == "pelton.errors")
        if _package(target) not in RANK
        or _package(module) not in RANK
        or RANK[_package(target)] >= RANK[_package(module)]
    ]
    assert backwards == []


def test_public_names_come_from_the_package_not_from_the_door() -> None:
    """Inside, modules import from where a thing lives, never from `pelton` itself."""
    files = [p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"]
    for path in files:
        for target in _imports(ast.parse(path.read_text(encoding="utf-8")), str(path)):
            assert target == "pelton" or target.removeprefix("pelton.").split(".")[0] not in pelton.__all__, path


def test_no_import_cycles() -> None:
    graph = _modules()
    state: dict[str, int] = {}
    cycles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(graph[module]):
            if state.get(target) == 1:
                cycles.append(" → ".join([*path, module, target]))
            elif target not in state:
                visit(target, [*path, module])
        state[module] = 2

    for module in graph:
        if module not in state:
            visit(module, [])
    assert cycles == []


def _fresh(script: str) -> None:
    """Runs a script in a process of its own."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_is_light_and_registers_later() -> None:
    _fresh("""
import sys, importlib.util
import pelton
heavy = {"torch", "transformers", "peft", "pandas", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert importlib.util.find_spec("peft") is not None  # as transformers asks whether it is installed
assert "peft" not in sys.modules
import peft
assert "PELTON" in peft.PeftType.__members__
assert peft.__spec__.loader is peft.__loader__
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("pelton")]
""")


def test_models_are_announced_and_loaded_when_they_are_asked_for() -> None:
    _fresh("""
import sys, pelton
from transformers import AutoConfig
from pelton.models import MODELS
assert not [home for home, _ in MODELS.values() if home in sys.modules]
for model_type, (home, name) in MODELS.items():
    config = AutoConfig.for_model(model_type)
    assert type(config) is getattr(sys.modules[home], name)
    assert config.model_type == model_type
""")


def test_models_are_announced_where_transformers_is_loaded_already() -> None:
    _fresh("""
import transformers.models.auto.modeling_auto, pelton
from transformers import AutoConfig, AutoModel
from pelton.models import MODELS
for model_type in MODELS:
    assert AutoModel.from_config(AutoConfig.for_model(model_type)).config.model_type == model_type
""")


# What Pelton relies on in PEFT

HOOKS: dict[str, tuple[Any, list[str]]] = {
    "_enable_peft_forward_hooks": (PeftModel, ["self", "args", "kwargs"]),  # it calls the tuner's, where there is one
    "_check_merge_allowed": (BaseTuner, ["self"]),
    "_unload_and_optionally_merge": (BaseTuner, ["self", "merge", "progressbar", "safe_merge", "adapter_names"]),
    "_remove_adapter_name_from_key": (BaseTuner, ["key", "adapter_name"]),
    "_remap_adapter_state_dict_for_load": (BaseTuner, ["model", "config", "adapter_name", "state_dict"]),
    "_create_and_replace": (
        BaseTuner,
        ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"],
    ),
    "inject_adapter": (
        BaseTuner,
        ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    ),
    "_mark_only_adapters_as_trainable": (BaseTuner, ["self", "model"]),
    "set_adapter": (BaseTuner, ["self", "adapter_name", "inference_mode"]),
    "delete_adapter": (BaseTuner, ["self", "adapter_name"]),
    "merge_adapter": (BaseTuner, ["self", "adapter_names", "safe_merge"]),
    "get_model_config": (BaseTuner, ["model"]),
    "unload_and_optionally_merge_module": (
        AuxiliaryTrainingWrapper,
        ["self", "merge", "safe_merge", "adapter_names"],
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_peft_has_the_hooks_that_pelton_overrides_or_calls(name: str) -> None:
    owner, parameters = HOOKS[name]
    method = getattr(owner, name)
    names = [p for p in inspect.signature(method).parameters if p not in ("cls", "self")]
    assert names == [p for p in parameters if p != "self"]
    ours = inspect.signature(getattr(PeltonModel, name)).parameters if owner is BaseTuner else {}
    if ours and name != "_create_and_replace":  # only Pelton calls its own
        assert set(names) <= set(ours)


def test_peft_calls_the_tuners_hook_around_a_forward() -> None:
    """`PeftModel` enters the context that the tuner's `_enable_peft_forward_hooks` gives, for every task."""
    arch = ARCHS["bert"]
    for task in (None, "SEQ_CLS", "FEATURE_EXTRACTION"):
        model = attached(arch, task_type=task)
        seen: list[Any] = []

        @contextmanager
        def note(*args: Any, seen: list[Any] = seen, **kwargs: Any) -> Iterator[None]:
            seen.append(kwargs.get("adapter_names"))
            yield

        model.base_model._enable_peft_forward_hooks = note
        with torch.no_grad():
            model(**arch.inputs(), adapter_names=["default"] * 3)
        assert seen == [["default"] * 3]


def test_class_hooks_are_classmethods() -> None:
    for name in ("_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"):
        assert isinstance(inspect.getattr_static(BaseTuner, name), classmethod)
        assert isinstance(inspect.getattr_static(PeltonModel.__mro__[1], name), classmethod)


def test_layers_have_what_pelton_sets() -> None:
    for name in ("adapter_layer_names", "_disable_adapters", "_active_adapter", "merged_adapters"):
        assert hasattr(BaseTunerLayer, name), name
    for name in ("active_adapters", "set_adapter", "enable_adapters", "delete_adapter"):
        assert callable(getattr(BaseTunerLayer, name)) or isinstance(
            inspect.getattr_static(BaseTunerLayer, name), property
        )


def test_wrapped_modules_keep_the_original() -> None:
    wrapper = ModulesToSaveWrapper(torch.nn.Linear(2, 2), "default")
    assert isinstance(wrapper, AuxiliaryTrainingWrapper)
    assert isinstance(wrapper.original_module, torch.nn.Linear)
    assert wrapper.modules_to_save["default"] is not wrapper.original_module


def test_member_survives_lookup_pickle_and_copies() -> None:
    member: Any = PeftType["PELTON"]
    assert PeftType("PELTON") is member
    assert PeftType.PELTON is member  # type: ignore[attr-defined]
    assert member in list(PeftType)
    assert member == "PELTON"
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str(member.value)) == ("PELTON", "PELTON", "PELTON")
    assert copy.copy(member) is copy.deepcopy(member) is member
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert hash(member) == hash(PeftType("PELTON"))
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("PELTONN")
    assert PeftType["LORA"] is PeftType("LORA")


def test_member_is_in_the_tables_of_peft() -> None:
    member = PeftType["PELTON"]
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is PeltonConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is PeltonModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] == PeltonModel.prefix
    assert isinstance(peft.get_peft_config({"peft_type": "PELTON", "methods": ["lora"]}), PeltonConfig)


def test_registering_twice_is_harmless() -> None:
    assert _member() is PELTON
    assert [m.name for m in PeftType].count("PELTON") == 1


def test_configs_survive_copies_and_pickles() -> None:
    config = PeltonConfig(task_type="SEQ_CLS", methods=list(METHODS.values())[:2], gate="linear")
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.peft_type is config.peft_type
        assert twin.to_dict() == config.to_dict()


def test_signatures_name_the_arguments() -> None:
    """They are what editors and `help` show, and what PEFT looks up where a file has unknown keys."""
    assert list(inspect.signature(pelton.LoRA).parameters) == ["rank", "alpha", "dropout", "sites", "layers"]
    assert {"hidden_size", "entropy"} < set(inspect.signature(pelton.MLPGate).parameters)
    assert {"methods", "gate", "peft_type"} < set(inspect.signature(PeltonConfig).parameters)
    assert {"methods", "gate", "peft_type"} < set(inspect.signature(PeltonConfig.__init__).parameters)


def test_keys_of_an_adapter_are_those_under_its_gated_blocks() -> None:
    """PEFT selects what to save by the type of a layer, not by its names."""
    model = attached(ARCHS["bert"])
    blocks = {name for name, module in model.named_modules() if isinstance(module, GatedBlock)}
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name="default")
    assert prefixes == {f"{block}.{part}.default" for block in blocks for part in ("gates", "methods")}
    tuner_keys = {k for k in model.state_dict() if any(k == p or k.startswith(f"{p}.") for p in prefixes)}
    assert tuner_keys == {k for k in model.state_dict() if any(k.startswith(f"{b}.") for b in blocks)}
    saved = get_peft_model_state_dict(model)
    assert set(saved) == {k.replace(".default.", ".") for k in tuner_keys}
    assert {PeltonModel._remove_adapter_name_from_key(k, "default") for k in tuner_keys} == set(saved)


def test_each_of_two_adapters_is_saved_alone() -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig(methods=together(arch)), adapter_name="first")
    model.add_adapter("second", PeltonConfig(methods=together(arch), gate="scalar"))
    wake(wake(model, "first", 1), "second", 2)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in ("first", "second"):
        saved = get_peft_model_state_dict(model, adapter_name=name)
        mine = {k: v for k, v in tensors.items() if f".{name}." in k}
        assert set(saved) == {k.replace(f".{name}.", ".") for k in mine}
        assert all(torch.equal(v, saved[k.replace(f".{name}.", ".")]) for k, v in mine.items())


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("m.layer.0.pelton.methods.default.lora.attn_q.A", "m.layer.0.pelton.methods.lora.attn_q.A"),
        ("m.layer.0.pelton.gates.default.hidden.weight", "m.layer.0.pelton.gates.hidden.weight"),
        ("m.default.0.pelton.gates.default.theta", "m.default.0.pelton.gates.theta"),
        ("m.layer.0.pelton.gates.other.theta", "m.layer.0.pelton.gates.other.theta"),
    ],
)
def test_adapter_names_leave_keys(key: str, expected: str) -> None:
    assert PeltonModel._remove_adapter_name_from_key(key, "default") == expected


def test_pins_are_what_was_tested() -> None:
    requires = {re.split(r"[<>=\[ ;]", r)[0]: r for r in metadata.requires("pelton") or () if "extra ==" not in r}
    assert {">=0.21", "<0.23"} <= set(re.split(r"peft|,", requires["peft"]))
    assert {">=5.20", "<6"} <= set(re.split(r"transformers|,", requires["transformers"]))
