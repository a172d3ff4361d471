"""Laws 7, 8 and 11: saving, folding, several adapters, mixed batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from law import METHODS, attached, far, together, wake
from pelton import IA3, BitFit, FixedGate, LoRA, MLPGate, PeltonConfig, ScalarGate, set_methods, set_stage
from pelton.errors import AdapterError, UnknownName
from pelton.methods import LINEAR_SITES
from zoo import ARCHS, Arch


@pytest.mark.parametrize("gate", ["mlp", "scalar", "fixed"])
def test_saved_and_loaded_gives_the_same(arch: Arch, gate: str, tmp_path: Path) -> None:
    model, inputs = attached(arch, gate), arch.inputs()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    same = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    renamed = PeftModel.from_pretrained(arch.build(), tmp_path, adapter_name="other").eval()
    with torch.no_grad():
        before = arch.run(model, inputs)
        assert torch.equal(before, arch.run(same, inputs))
        assert torch.equal(before, arch.run(renamed, inputs))


def test_a_saved_default_names_its_methods(arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(arch.build(), PeltonConfig(gate=FixedGate(0.5))).eval()
    assert PeltonConfig().methods is None
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("pelton.tuner.config.default_methods", lambda: (LoRA(rank=1),))
    again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    assert {spec.kind for spec in again.peft_config["default"].specs} == {"lora", "bottleneck"}
    with torch.no_grad():
        assert torch.equal(arch.run(model, arch.inputs()), arch.run(again, arch.inputs()))


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save(arch.run(model, arch.inputs()), tmp_path / "out.pt")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, pelton
from peft import PeftModel
from zoo import ARCHS
arch = ARCHS["bert"]
model = PeftModel.from_pretrained(arch.build(), {str(tmp_path)!r}).eval()
with torch.no_grad():
    assert torch.equal(arch.run(model, arch.inputs()), torch.load({str(tmp_path / "out.pt")!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_heads_are_saved_with_the_adapter(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, task_type="SEQ_CLS")
    head = model.get_base_model().classifier.modules_to_save["default"]
    torch.nn.init.normal_(head.weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(arch.run(model, arch.inputs()), arch.run(again, arch.inputs()))


def _two(arch: Arch) -> Any:
    """Adapters a and b of different methods and gates on one backbone."""
    model = get_peft_model(arch.build(), PeltonConfig(methods=together(arch)), adapter_name="a")
    lora = LoRA(rank=2, sites=LINEAR_SITES)
    model.add_adapter("b", PeltonConfig(methods=[lora, METHODS["bottleneck-parallel"]], gate=ScalarGate(0.4)))
    wake(model, "a", 1)
    return wake(model, "b", 2).eval()


def test_two_adapters_do_not_touch_each_other(arch: Arch) -> None:
    model, inputs = _two(arch), arch.inputs()
    alone = wake(get_peft_model(arch.build(), PeltonConfig(methods=together(arch)), adapter_name="a"), "a", 1).eval()
    with torch.no_grad():
        a = arch.run(model, inputs)
        assert torch.equal(a, arch.run(alone, inputs))
        model.set_adapter("b")
        b = arch.run(model, inputs)
        assert far(a, b) > 1e-5
        with model.disable_adapter():
            assert far(arch.run(model, inputs), arch.run(arch.build(), inputs)) == 0
        assert torch.equal(b, arch.run(model, inputs))
    arch.run(model.train(), inputs).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all(".b." in n for n in trained)
    model.delete_adapter("a")
    with torch.no_grad():
        assert torch.equal(b, arch.run(model.eval(), inputs))
    assert not [n for n, _ in model.named_parameters() if ".a." in n]


def test_mixed_batch_equals_rows_one_by_one(arch: Arch) -> None:
    model, inputs = _two(arch), arch.inputs()
    names = ["b", "__base__", "a"]
    with torch.no_grad():
        mixed = arch.run(model, inputs, adapter_names=names)
        for row, name in enumerate(names):
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = arch.run(model, one)
            else:
                model.set_adapter(name)
                alone = arch.run(model, one)
            assert far(mixed[row : row + 1], alone) <= 1e-6, name


def test_mixed_batches_generate() -> None:
    arch = ARCHS["llama"]
    model, ids = _two(arch), ARCHS["llama"].inputs()["input_ids"][:2]
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        mixed = model.generate(input_ids=ids, adapter_names=["a", "b"], num_beams=beams, **more)
        for row, name in enumerate(["a", "b"]):
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[row : row + 1], num_beams=beams, **more)
            assert torch.equal(mixed[row : row + 1], alone)


def test_mixed_batches_are_refused_in_training_and_for_unknown_names() -> None:
    arch = ARCHS["bert"]
    model = _two(arch)
    with pytest.raises(UnknownName, match=r"'bb'.*Did you mean 'b'"):
        arch.run(model, arch.inputs(), adapter_names=["a", "bb", "a"])
    with pytest.raises(AdapterError, match="training mode"):
        arch.run(model.train(), arch.inputs(), adapter_names=["a", "b", "a"])


FOLDED = [name for name in ARCHS if name not in ("blip",)]


@pytest.mark.parametrize("gate", [ScalarGate(0.3), FixedGate(0.7)])
def test_merged_equals_attached(arch: Arch, gate: Any) -> None:
    methods = [METHODS["lora"], METHODS["ia3"]]
    model, inputs = attached(arch, gate, methods, std=0.1), arch.inputs()
    names = [n for n, _ in arch.build().named_modules()]
    with torch.no_grad():
        before = arch.run(model, inputs)
        plain = model.merge_and_unload(safe_merge=True)
        assert far(before, arch.run(plain, inputs)) <= 1e-5
    assert [n for n, _ in plain.named_modules()] == names
    assert plain.state_dict().keys() == arch.build().state_dict().keys()


def test_adapters_at_work_together_merge_as_they_work() -> None:
    """At ffn.out: each adapter's LoRA reads the input that both adapters rescale and rotate."""
    arch = ARCHS["bert"]
    sites = ("ffn.out",)
    methods = [METHODS["oft"], IA3(sites=sites), LoRA(rank=2, sites=sites)]
    model = get_peft_model(arch.build(), PeltonConfig(methods=methods, gate=FixedGate(0.7)), adapter_name="a")
    model.add_adapter("b", PeltonConfig(methods=methods, gate=FixedGate(0.4)))
    wake(wake(model, "a", 1), "b", 2).eval()
    model.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        assert far(before, arch.run(arch.build(), arch.inputs())) > 1e-3
        assert far(before, arch.run(model.merge_and_unload(), arch.inputs())) <= 1e-5


def test_bitfit_merges_where_there_is_a_bias() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, ScalarGate(0.3), [METHODS["lora"], METHODS["ia3"], BitFit()], std=0.1)
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        assert far(before, arch.run(model.merge_and_unload(), arch.inputs())) <= 1e-5


@pytest.mark.parametrize(
    ("name", "gate", "methods", "why"),
    [
        ("bert", MLPGate(), ["lora"], "read the input"),
        ("bert", FixedGate(), ["lora", "bottleneck"], "'bottleneck', which is not a change of the backbone's weights"),
        ("bert", FixedGate(), ["prefix"], "'prefix'"),
        ("llama", FixedGate(), ["lora", "bitfit"], "has none to merge into"),
    ],
)
def test_inexact_merges_are_refused_untouched(name: str, gate: Any, methods: list[str], why: str) -> None:
    arch = ARCHS[name]
    model = wake(get_peft_model(arch.build(), PeltonConfig(methods=methods, gate=gate))).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        with pytest.raises(AdapterError, match=why):
            model.merge_and_unload()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        assert torch.equal(before, arch.run(model, arch.inputs()))


def test_methods_switch_off_and_on(arch: Arch) -> None:
    model, inputs = attached(arch), arch.inputs()
    kinds = {m.kind for m in together(arch)}
    with torch.no_grad():
        before = arch.run(model, inputs)
        for kind in kinds:
            set_methods(model, **{kind: False})
            assert far(before, arch.run(model, inputs)) > 1e-6, kind
            set_methods(model, **{kind: True})
            assert torch.equal(before, arch.run(model, inputs))
        set_methods(model, **dict.fromkeys(kinds, False))
        assert far(arch.run(model, inputs), arch.run(arch.build(), inputs)) <= 1e-6


def test_switching_an_unknown_method_changes_nothing() -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    with pytest.raises(UnknownName, match="Did you mean 'lora'"):
        set_methods(model, bottleneck=False, loar=False)
    assert all(not m.off for m in model.modules() if hasattr(m, "off"))


def test_stages_switch_and_are_saved(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    gate = FixedGate(stages={"pretrain": 0.01, "finetune": {"lora": 0.5, "bottleneck": 0.1}})
    model = attached(arch, gate, [METHODS["lora"], METHODS["bottleneck"]])
    with torch.no_grad():
        first = arch.run(model, arch.inputs())
        set_stage(model, "finetune")
        second = arch.run(model, arch.inputs())
        assert far(first, second) > 1e-5
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
        assert torch.equal(second, arch.run(again, arch.inputs()))
    with pytest.raises(UnknownName, match="Did you mean 'pretrain'"):
        set_stage(model, "pretraining")
