"""One model for many: several threads, rows with adapters of their own, loading by transformers, what is refused."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from pelton import LoRA, PeltonConfig
from pelton.errors import AdapterError
from test_wide import build, shake, tokens
from wide import DECODERS
from zoo import ARCHS


def with_two(name: str = "bert") -> PeftModel:
    """A model with the adapters `default` and `other`, both at work on their rows only."""
    torch.manual_seed(0)
    model = get_peft_model(ARCHS[name].build(), PeltonConfig())
    model.add_adapter("other", PeltonConfig(methods=[LoRA(rank=2)]))
    shake(model)
    return model.eval()


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits  # type: ignore[no-any-return]


# ---- threads -----------------------------------------------------------------------------------------------------


def test_threads_share_a_model() -> None:
    model = with_two()
    batches = [torch.randint(5, 90, (rows, length)) for rows, length in ((1, 4), (2, 9), (3, 6), (5, 12))] * 8
    expected = [logits(model, ids) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda ids: logits(model, ids), batches), expected, strict=True):
            assert torch.equal(found, wanted)


def test_mixed_batches_and_plain_ones_share_a_model() -> None:
    model = with_two()
    ids = torch.randint(5, 90, (3, 7))
    mixed = [["default", "other", "__base__"], ["other", "other", "default"], None] * 8
    call = lambda names: logits(model, ids, **({} if names is None else {"adapter_names": names}))  # noqa: E731
    expected = [call(names) for names in mixed]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(call, mixed), expected, strict=True):
            assert torch.equal(found, wanted)


def test_nothing_is_left_of_a_forward() -> None:
    model = with_two()
    ids = torch.randint(5, 90, (2, 5))
    logits(model, ids)
    assert all(block.flows.here() is None for block in model.base_model.blocks())

    def fail(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    layers = [module for name, module in model.named_modules() if name.endswith("1.intermediate.dense")]
    with layers[0].register_forward_pre_hook(fail), pytest.raises(ArithmeticError):
        logits(model, ids)
    assert all(block.flows.here() is None for block in model.base_model.blocks())


def test_data_parallel_is_refused() -> None:
    with pytest.raises(AdapterError, match="Start one process for each GPU with torchrun"):
        next(iter(with_two().base_model.blocks()))._replicate_for_data_parallel()


# ---- rows with adapters of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "qwen2-moe"])
def test_rows_of_flattened_layers_have_adapters_of_their_own(name: str) -> None:
    model: Any = get_peft_model(build(*DECODERS[name], auto=_causal()), PeltonConfig())
    model.add_adapter("other", PeltonConfig())
    shake(model)
    model.eval()
    ids = tokens(0)
    found = logits(model, ids, adapter_names=["other", "__base__", "default"])
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=ids).logits
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = logits(model, ids)
    expected = torch.stack([alone["other"][0], plain[1], alone["default"][2]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def test_as_many_names_as_rows_are_expected() -> None:
    model = with_two()
    ids = torch.randint(5, 90, (3, 7))
    for names in (["default"], ["default"] * 4):
        with pytest.raises(AdapterError, match=rf"expected 3 names, but got {len(names)}"):
            logits(model, ids, adapter_names=names)
    with pytest.raises(AdapterError, match="must be a list with one name for each row, but got 'default'"):
        logits(model, ids, adapter_names="default")
    assert logits(model, ids).shape[0] == 3  # and nothing is left of it


def test_generation_may_repeat_rows() -> None:
    model = with_two("llama")
    ids = torch.randint(5, 90, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    found = model.generate(input_ids=ids, adapter_names=["other", "default"], **options)
    for row, adapter in enumerate(("other", "default")):
        model.set_adapter(adapter)
        alone = model.generate(input_ids=ids[row : row + 1], **options)
        kept = min(found.shape[1], alone.shape[1])
        assert torch.equal(found[2 * row : 2 * row + 2, :kept], alone[:, :kept])


# ---- loading by transformers -------------------------------------------------------------------------------------


def test_transformers_loads_an_adapter_as_peft_does(tmp_path: Path) -> None:
    base = ARCHS["bert"].build().eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), PeltonConfig(modules_to_save=["classifier"]))
    shake(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(5, 90, (2, 6))
    expected = logits(model.eval(), ids)
    base.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(base.eval(), ids), expected)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, ids), expected)


# ---- names and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder", "layer", "0", "model", "lora", "a.b"])
def test_names_that_would_cost_other_adapters_their_weights_are_refused(name: str) -> None:
    model = with_two()
    with pytest.raises(AdapterError, match="An adapter cannot be named"):
        model.add_adapter(name, PeltonConfig())
    assert set(model.peft_config) == {"default", "other"}


def test_the_last_adapter_goes_with_its_head() -> None:
    ids = torch.randint(5, 90, (2, 5))
    model = get_peft_model(ARCHS["bert"].build(), PeltonConfig(modules_to_save=["classifier"])).eval()
    with pytest.raises(AdapterError, match=r"is the last adapter, and its head cannot go alone. Call unload\(\)"):
        model.delete_adapter("default")
    assert logits(model, ids).shape[0] == logits(model.unload(), ids).shape[0] == 2


def test_pefts_way_to_combine_points_to_peltons() -> None:
    with pytest.raises(AdapterError, match=r"pelton.combine"):
        with_two().add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")


def test_auto_model_reads_an_adapters_folder(tmp_path: Path) -> None:
    ARCHS["bert"].build().bert.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), PeltonConfig())
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(5, 90, (2, 6))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).last_hidden_state
        found = AutoModel.from_pretrained(tmp_path / "adapter").eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_parts_of_a_block_may_be_compiled() -> None:
    for part in ("mlp", "self_attn"):
        model = with_two("llama")
        ids = torch.randint(5, 90, (2, 6))
        expected = logits(model, ids)
        for name, module in model.named_modules():
            if name.endswith(f".{part}"):
                module.compile(backend="eager")
        torch.testing.assert_close(logits(model, ids), expected)
        assert all(not block.flows._by_thread for block in model.base_model.blocks())
