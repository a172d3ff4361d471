"""Law 12: `torch.compile` without graph breaks and `torch.export` with free sizes agree with eager."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from law import GATES, METHODS, attached, far
from pelton import Prefix
from zoo import ARCHS, Arch

LIMIT = 1e-4


NAMES = ["bert", "modernbert", "gpt2", "llama", "qwen3", "t5", "bart", "vit", "swin"]
NAMES += ["minigpt", "minigpt-alibi", "minigpt-learned"]
"""Representative backbones. Each compiles and exports without an adapter, so that what fails here is the adapter's."""

FORMS = {name: METHODS[name] for name in ("bottleneck-parallel", "prefix-mlp", "prefix-token", "dilated-rates")} | {
    "prefix-scale": Prefix(prefix_length=3, gating="scale", init_std=1.0)
}
"""What an adapter of all methods does not hold."""


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    traces = logging.getLogger("torch.__trace")  # pytest would capture and format each of thousands of records
    monkeypatch.setattr(traces, "handlers", [])
    monkeypatch.setattr(traces, "addHandler", lambda handler: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Positional(nn.Module):
    """A model that takes tensors in order and returns one: what `torch.export` is at home with."""

    def __init__(self, arch: Arch, model: nn.Module) -> None:
        super().__init__()
        self.arch, self.model, self.names = arch, model, list(arch.inputs())

    def forward(self, *tensors: Tensor) -> Tensor:
        more = {"use_cache": False} if self.arch.causal else {}
        return self.arch.run(self.model, dict(zip(self.names, tensors, strict=True)), **more)


def _tokens(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _longer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with two more tokens, which all rows see."""
    return {k: torch.cat([v[:, :2], v], 1) if _tokens(v) else v for k, v in inputs.items()}


def _free(tensor: Tensor) -> dict[int, Any]:
    """Batch and, for text, length are free."""
    return {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if _tokens(tensor) else {})


def _differences(eager: nn.Module, other: Any, arch: Arch) -> list[float]:
    """Differences on the inputs that were traced, and on more tokens in fewer rows."""
    batches = [arch.inputs(), _longer(arch.inputs(batch=2, seed=4))]
    with torch.no_grad():
        return [far(eager(*batch.values()), other(*batch.values())) for batch in batches]


def _export(model: Positional, arch: Arch) -> nn.Module:
    inputs = arch.inputs()
    shapes = {"tensors": tuple(_free(v) for v in inputs.values())}
    with torch.no_grad():
        return torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes, strict=False).module()


def _compile(model: Any, backend: str = "aot_eager", dynamic: bool = False) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)


def _difference(eager: nn.Module, compiled: Any, arch: Arch) -> float:
    tensors = arch.inputs().values()
    with torch.no_grad():
        return far(eager(*tensors), compiled(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name: str) -> None:
    arch = ARCHS[name]
    model = Positional(arch, attached(arch)).eval()
    assert _difference(model, _compile(model), arch) <= LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_exported_equals_eager(name: str) -> None:
    arch = ARCHS[name]
    model = Positional(arch, attached(arch)).eval()
    exported = _export(model, arch)
    assert max(_differences(model, exported, arch)) <= LIMIT
    with torch.no_grad():
        plain = Positional(arch, arch.build())
        assert far(plain(*arch.inputs().values()), exported(*arch.inputs().values())) > 1e-4  # the adapter is in it


@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_and_exports(form: str) -> None:
    arch = ARCHS["bert"]
    model = Positional(arch, attached(arch, methods=[FORMS[form]])).eval()
    assert _difference(model, _compile(model), arch) <= LIMIT
    assert max(_differences(model, _export(model, arch), arch)) <= LIMIT


def test_dilation_on_a_grid_compiles_and_exports() -> None:
    arch = ARCHS["vit"]
    model = Positional(arch, attached(arch, methods=[METHODS["dilated-grid"]])).eval()
    assert _difference(model, _compile(model), arch) <= LIMIT
    assert max(_differences(model, _export(model, arch), arch)) <= LIMIT


@pytest.mark.parametrize("gate", [name for name in GATES if name != "mlp"])
def test_every_gate_compiles_and_exports(gate: str) -> None:
    arch = ARCHS["bert"]
    model = Positional(arch, attached(arch, gate, [METHODS["prefix-kv"]])).eval()
    assert _difference(model, _compile(model), arch) <= LIMIT
    assert max(_differences(model, _export(model, arch), arch)) <= LIMIT


def test_compiled_with_free_sizes_equals_eager() -> None:
    arch = ARCHS["bert"]
    model = Positional(arch, attached(arch, methods=[METHODS["bottleneck"]])).eval()
    assert max(_differences(model, _compile(model, dynamic=True), arch)) <= LIMIT


def test_compiled_gradients_equal_eager_ones() -> None:
    arch, inputs = ARCHS["bert"], ARCHS["bert"].inputs()
    model = attached(arch)
    arch.run(model, inputs).square().sum().backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    arch.run(_compile(model), inputs).square().sum().backward()
    compiled = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert eager.keys() == compiled.keys()
    assert max(far(eager[name], compiled[name]) for name in eager) <= LIMIT


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor itself uses what torch deprecates
@pytest.mark.parametrize(("name", "methods"), [("vit", ["lora", "prefix-kv"]), ("llama", ["bottleneck", "ia3"])])
def test_inductor_equals_eager(name: str, methods: list[str]) -> None:
    arch = ARCHS[name]
    model = Positional(arch, attached(arch, methods=[METHODS[method] for method in methods])).eval()
    assert _difference(model, _compile(model, "inductor"), arch) <= LIMIT
