"""Pelton where it is used: Trainer with resume, TRL, accelerate, PEFT's own ways of loading, merging and DDP."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from law import METHODS, attached, far, together, wake
from pelton import FixedGate, LoRA, MLPGate, PeltonConfig, ScalarGate
from pelton.methods import LINEAR_SITES
from zoo import ARCHS

# transformers 5.23 renamed the argument and warns about the old name; 5.20 has only that.
CHECKPOINTING = next(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


def _rows(count: int) -> list[dict[str, Tensor]]:
    """Labelled rows of a batch of the zoo."""
    inputs = ARCHS["bert"].inputs(3)
    rows = [{k: v[i % 3] for k, v in inputs.items()} for i in range(count)]
    return [row | {"labels": torch.tensor(i % 2)} for i, row in enumerate(rows)]


def _adapted(**more: Any) -> Any:
    arch = ARCHS["bert"]
    config = PeltonConfig(task_type="SEQ_CLS", methods=together(arch), gate=MLPGate(entropy=0.1), **more)
    return get_peft_model(arch.build(), config)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


# Trainer


def _trainer(model: Any, folder: Path, checkpointing: bool) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        seed=3,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
        **{CHECKPOINTING: checkpointing},
    )
    return Trainer(model=model, args=arguments, train_dataset=_rows(8))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumed_training_equals_uninterrupted(checkpointing: bool, tmp_path: Path) -> None:
    model = _adapted()
    start, backbone = _trainable(model), _frozen(model)
    _trainer(model, tmp_path, checkpointing).train()
    through = _trainable(model)
    assert all(not torch.equal(start[n], through[n]) for n in start)
    assert all(torch.equal(backbone[n], v) for n, v in _frozen(model).items())
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()

    torch.manual_seed(99)  # another process starts elsewhere
    again = wake(_adapted(), seed=99)
    _trainer(again, tmp_path, checkpointing).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = _trainable(again)
    assert resumed.keys() == through.keys()
    assert max(far(through[n], resumed[n]) for n in through) <= 1e-6


def test_checkpoints_of_the_trainer_load_as_adapters(tmp_path: Path) -> None:
    model = _adapted()
    _trainer(model, tmp_path, False).train()
    loaded = PeftModel.from_pretrained(ARCHS["bert"].build(), tmp_path / "checkpoint-6").eval()
    with torch.no_grad():
        expected = ARCHS["bert"].run(model.eval(), ARCHS["bert"].inputs())
        assert torch.equal(expected, ARCHS["bert"].run(loaded, ARCHS["bert"].inputs()))


# TRL

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *["the", "cat", "dog", "sat", "ran", "on", "mat", "log", "and", "then"]]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_takes_the_config(checkpointing: bool, tmp_path: Path) -> None:
    arch = ARCHS["llama"]
    texts = ["the cat sat on the mat", "the dog ran", "the cat ran and then sat", "the dog sat on the log and ran"]
    trainer = SFTTrainer(
        model=arch.build(),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=16,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            **{CHECKPOINTING: checkpointing},
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=_tokenizer(),
        peft_config=PeltonConfig(task_type="CAUSAL_LM"),
    )
    start, backbone = _trainable(trainer.model), _frozen(trainer.model)
    assert start
    assert all(".pelton." in name for name in start)
    trainer.train()
    moved = _trainable(trainer.model)
    assert all(not torch.equal(start[n], moved[n]) for n in start)
    assert all(torch.equal(backbone[n], v) for n, v in _frozen(trainer.model).items())
    plain = arch.build().state_dict()
    assert all(torch.equal(v, plain[n.removeprefix("base_model.model.")]) for n, v in backbone.items())

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(arch.build(), tmp_path / "adapter").eval()
    ids = {"input_ids": arch.inputs()["input_ids"] % len(WORDS)}
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**ids).logits, loaded(**ids).logits)


# accelerate


def test_an_accelerate_loop_trains_the_adapter() -> None:
    model = _adapted().train()
    start, backbone = _trainable(model), _frozen(model)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(_rows(6), batch_size=3))  # type: ignore[arg-type]
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    inner = accelerator.unwrap_model(model)
    assert all(not torch.equal(start[n], p) for n, p in inner.named_parameters() if n in start)
    assert all(torch.equal(backbone[n], p) for n, p in inner.named_parameters() if n in backbone)


# PEFT's ways


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "swin"])
def test_low_memory_loading_gives_the_same(name: str, tmp_path: Path) -> None:
    arch = ARCHS[name]
    model = attached(arch)
    model.save_pretrained(tmp_path)
    low = PeftModel.from_pretrained(arch.build(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(t.is_meta for t in (*low.parameters(), *low.buffers()))
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
        assert torch.equal(out, arch.run(low, arch.inputs()))
        low.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
        low.set_adapter("second")
        assert torch.equal(out, arch.run(low, arch.inputs()))


@pytest.mark.parametrize("gate", ["mlp", "scalar", "fixed"])
def test_low_memory_loading_fills_every_gate(gate: str, tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, gate)
    model.save_pretrained(tmp_path)
    low = PeftModel.from_pretrained(arch.build(), tmp_path, low_cpu_mem_usage=True).eval()
    with torch.no_grad():
        assert torch.equal(arch.run(model, arch.inputs()), arch.run(low, arch.inputs()))


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_adapters_train_only_when_asked(trainable: bool, tmp_path: Path) -> None:
    _adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(ARCHS["bert"].build(), tmp_path, is_trainable=trainable)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == (set(_trainable(_adapted())) if trainable else set())
    assert model.peft_config["default"].inference_mode is not trainable


def test_backbone_and_adapter_load_by_one_name(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    arch.build().save_pretrained(tmp_path / "backbone")
    backbone = type(arch.build()).from_pretrained(tmp_path / "backbone")
    config = PeltonConfig(task_type="SEQ_CLS", methods=together(arch))
    model = wake(get_peft_model(backbone, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(arch.run(model, arch.inputs()), arch.run(loaded, arch.inputs()))


def test_every_module_can_be_asked_for_its_weight() -> None:
    """Libraries walk over modules so; PEFT's layers look for what they wrap, and a gated block wraps nothing."""
    for module in attached(ARCHS["bert"]).modules():
        for name in ("weight", "bias", "base_layer", "in_features"):
            assert hasattr(module, name) in (True, False)


def test_trainable_parameters_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = _adapted()
    model.print_trainable_parameters()
    found = re.fullmatch(
        r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\| trainable%: ([\d.]+)\n", capsys.readouterr().out
    )
    assert found
    trainable, total = (int(n.replace(",", "")) for n in found.groups()[:2])
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())
    assert float(found[3]) == pytest.approx(100 * trainable / total, abs=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3", "vit"])
def test_two_merged_adapters_sum_their_deltas(name: str) -> None:
    arch = ARCHS[name]
    inputs, plain = arch.inputs(), arch.build().state_dict()

    def loras(*names: str) -> Any:
        lora = LoRA(rank=2, sites=LINEAR_SITES)
        configs = {"a": PeltonConfig(methods=[lora], gate=ScalarGate(0.3)), "b": PeltonConfig.single(lora)}
        model = get_peft_model(arch.build(), configs[names[0]], adapter_name=names[0])
        for other in names[1:]:
            model.add_adapter(other, configs[other])
        for seed, each in enumerate(("a", "b")):
            wake(model, each, seed, std=0.1)
        model.base_model.set_adapter(list(names))
        return model.eval()

    both = loras("a", "b")
    with torch.no_grad():
        out = arch.run(both, inputs)
        merged = both.merge_and_unload()
        assert far(out, arch.run(merged, inputs)) <= 1e-5
    alone = {each: loras(each).merge_and_unload().state_dict() for each in ("a", "b")}
    for key, value in merged.state_dict().items():
        if value.is_floating_point():
            deltas = [alone[each][key] - plain[key] for each in ("a", "b")]
            assert far(value, plain[key] + sum(deltas)) <= 1e-6, key
    assert any(not torch.equal(value, plain[key]) for key, value in merged.state_dict().items())


def test_merging_one_of_two_leaves_the_other_out() -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig.single("lora"), adapter_name="a")
    model.add_adapter("b", PeltonConfig.single("ia3"))
    wake(wake(model, "a", 1, std=0.1), "b", 2, std=0.1).eval()
    model.set_adapter("b")
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
        assert far(out, arch.run(model.merge_and_unload(adapter_names=["b"]), arch.inputs())) <= 1e-5


@pytest.mark.parametrize("way", ["unload", "merge"])
def test_heads_are_put_back_or_kept(way: str) -> None:
    arch = ARCHS["bert"]
    gate = FixedGate(0.7)
    model = attached(arch, gate, [METHODS["lora"]], std=0.1, task_type="SEQ_CLS")
    head = model.get_base_model().classifier.modules_to_save["default"]
    nn.init.normal_(head.weight)
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
        plain = model.unload() if way == "unload" else model.merge_and_unload()
        assert isinstance(plain.classifier, nn.Linear)
        expected = arch.run(arch.build(), arch.inputs()) if way == "unload" else out
        assert far(expected, arch.run(plain, arch.inputs())) <= (0 if way == "unload" else 1e-5)


# Two processes

STEPS = 2


def _train_two_steps(model: Any, batches: list[dict[str, Tensor]]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def _ddp_model() -> Any:
    arch = ARCHS["bert"]
    model = wake(
        get_peft_model(arch.build(), PeltonConfig(task_type="SEQ_CLS", methods=together(arch), gate=MLPGate()))
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def _global_batches() -> list[dict[str, Tensor]]:
    """Batches of four rows of different lengths."""
    batches = []
    for step in range(STEPS):
        inputs = ARCHS["bert"].inputs(4, seed=step)
        batches.append(inputs | {"labels": torch.tensor([0, 1, 1, 0])})
    return batches


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = _ddp_model()
    mine = [{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in _global_batches()]
    _train_two_steps(DistributedDataParallel(model), mine)
    torch.save(_trainable(model), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    model = _ddp_model()
    start = _trainable(model)
    _train_two_steps(model, _global_batches())
    alone = _trainable(model)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == alone.keys()
    assert all(torch.equal(first[n], second[n]) for n in alone)
    assert max(far(alone[n], first[n]) for n in alone) <= 1e-6
    assert any(far(start[n], alone[n]) > 1e-4 for n in alone)
