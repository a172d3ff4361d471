"""The mean-pooling head: padding changes nothing, the encoder's weights stay, it saves and loads like any model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, DistilBertConfig, GPT2Config, PreTrainedConfig, RobertaConfig

from pelton.tasks.heads import MeanPoolingClassifier, _calibrated_scale, mean_pool
from pelton.training.backbone import head_modules
from tiny import bert_config

SMALL: dict[str, Any] = {"vocab_size": 30, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": bert_config,
    "roberta": lambda: RobertaConfig(
        **SMALL,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    ),
    "distilbert": lambda: DistilBertConfig(**SMALL, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "gpt2": lambda: GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    config = CONFIGS[request.param]()
    config.num_labels = 3
    return config


def wrapped(config: PreTrainedConfig) -> MeanPoolingClassifier:
    encoder = AutoModel.from_config(config)
    return MeanPoolingClassifier(encoder.config, encoder).eval()


def test_mean_pool_is_the_mean_of_what_the_mask_lets_through() -> None:
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    pooled = mean_pool(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1].mean(0))
    torch.testing.assert_close(mean_pool(hidden, None), hidden.mean(1))


def test_wrapping_leaves_the_encoders_weights_alone(config: PreTrainedConfig) -> None:
    encoder = AutoModel.from_config(config)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = MeanPoolingClassifier(encoder.config, encoder)
    assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    assert head_modules(model) == ["classifier"]


def test_padding_changes_nothing(config: PreTrainedConfig) -> None:
    model = wrapped(config)
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    torch.testing.assert_close(model(padded, mask).logits, model(IDS, torch.ones_like(IDS)).logits, atol=1e-6, rtol=0)


def test_the_loss_is_the_mean_cross_entropy(config: PreTrainedConfig) -> None:
    labels = torch.tensor([0, 2])
    output = wrapped(config)(IDS, torch.ones_like(IDS), labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert output.logits.shape == (2, 3)


def test_it_saves_and_loads_like_any_model(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = wrapped(config)
    model.save_pretrained(tmp_path)
    loaded = MeanPoolingClassifier.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert loaded.config.num_labels == 3


def test_checkpointed_gradients_equal_plain_ones(config: PreTrainedConfig) -> None:
    for name in ("classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "resid_pdrop"):
        setattr(config, name, 0.0)
    for name in ("attention_dropout", "embd_pdrop", "attn_pdrop", "seq_classif_dropout"):
        setattr(config, name, 0.0)
    model = wrapped(config).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(IDS, torch.ones_like(IDS), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_it_takes_a_peft_adapter_without_a_task_type() -> None:
    config = bert_config(num_labels=3)
    model = get_peft_model(wrapped(config), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trainable)
    output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_a_bfloat16_encoder_runs() -> None:
    encoder = AutoModel.from_config(BertConfig(**bert_config().to_dict()), dtype=torch.bfloat16)
    encoder.config.num_labels = 2
    model = MeanPoolingClassifier(encoder.config, encoder)
    assert model(IDS, torch.ones_like(IDS)).logits.dtype == torch.bfloat16


def test_class_means_classify_by_the_nearest_mean(config: PreTrainedConfig) -> None:
    model = MeanPoolingClassifier(config).eval()
    batch = {
        "input_ids": torch.randint(5, 20, (6, 7)),
        "attention_mask": torch.ones(6, 7, dtype=torch.long),
        "labels": torch.tensor([0, 1, 0, 1, 0, 1]),
    }
    untouched = model.classifier.weight[2].clone()
    model.start_from_class_means([batch])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        features = model.backbone(**inputs).last_hidden_state.mean(dim=1)
        logits = model(**inputs).logits[:, :2]
    means = torch.stack([features[batch["labels"] == k].mean(dim=0) for k in (0, 1)])
    nearest = torch.cdist(features, means).argmin(dim=1)
    assert torch.equal(logits.argmax(dim=1), nearest)
    assert torch.equal(model.classifier.weight[2], untouched)  # a class without examples


@pytest.mark.parametrize("apart", [0.0, 0.7, 3.0])
def test_class_means_start_as_sure_as_they_are_right(apart: float) -> None:
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    f = torch.randn(400, 16) + apart * torch.eye(4, 16)[y]  # the right s is 1: −|f − μ|² / 2 is the log-likelihood
    means = torch.stack([f[:200][y[:200] == k].mean(dim=0) for k in range(4)])
    scale = _calibrated_scale(f[:200], y[:200], means, torch.tensor(20.0))
    trials = torch.logspace(-3, 2, 200)
    losses = [nn.functional.cross_entropy(-s / 2 * torch.cdist(f[200:], means).square(), y[200:]) for s in trials]
    ours = nn.functional.cross_entropy(-scale / 2 * torch.cdist(f[200:], means).square(), y[200:])
    assert ours < min(losses) + 0.02
    assert ours < math.log(4) + 0.02
    if apart == 3.0:
        assert 0.7 < scale < 1.4
        assert _calibrated_scale(f, y, means, torch.tensor(0.1)) == 0.1  # no surer than that


def test_single_examples_and_equal_ones_have_a_scale() -> None:
    usual = torch.tensor(2.0)
    f = torch.randn(3, 4)
    assert _calibrated_scale(f, torch.arange(3), f, usual) == usual  # none can be left out
    twice = torch.cat([f, f])
    assert _calibrated_scale(twice, torch.arange(6) % 3, f, usual) == usual  # nor with its copies
    same = torch.ones(4, 4)
    assert _calibrated_scale(same, torch.arange(4) % 2, same[:2], usual).isfinite()


@pytest.mark.parametrize("signal", [0.0, 0.3])
def test_copies_of_texts_change_nothing(signal: float) -> None:
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    f = torch.randn(120, 24) + signal * torch.eye(3, 24)[y]
    means = torch.stack([f[y == k].mean(dim=0) for k in range(3)])
    once = _calibrated_scale(f, y, means, torch.tensor(1e6))
    again = torch.randperm(360)
    noisy = (f.repeat(3, 1) + 1e-6 * torch.randn(360, 24))[again]
    torch.testing.assert_close(_calibrated_scale(noisy, y.repeat(3)[again], means, torch.tensor(1e6)), once)


@pytest.mark.parametrize("rows", [100, 20_000])
def test_means_of_noise_start_at_chance_however_many_rows_there_are(rows: int) -> None:
    torch.manual_seed(1)
    f, y = torch.randn(rows, 32), torch.arange(rows) % 2
    means = torch.stack([f[y == k].mean(dim=0) for k in range(2)])
    scale = _calibrated_scale(f, y, means, 4.0 / (means[0] - means[1]).square().sum())
    loss = nn.functional.cross_entropy(
        -scale / 2 * torch.cdist(torch.randn(500, 32), means).square(), torch.arange(500) % 2
    )
    assert loss < math.log(2) + 0.01


def test_means_that_tell_nothing_do_not_start_worse_than_chance() -> None:
    torch.manual_seed(0)
    model = MeanPoolingClassifier(bert_config(num_labels=2)).eval()
    batch = {"input_ids": torch.randint(5, 20, (64, 7)), "labels": torch.arange(64) % 2}
    model.start_from_class_means([batch])
    new = {"input_ids": torch.randint(5, 20, (256, 7)), "labels": torch.arange(256) % 2}
    with torch.no_grad():
        assert model(**new).loss < math.log(2) + 0.02


def test_texts_that_are_all_alike_give_a_head_of_numbers() -> None:
    model = MeanPoolingClassifier(bert_config(num_labels=2)).eval()
    model.start_from_class_means([{"input_ids": torch.full((6, 4), 7), "labels": torch.arange(6) % 2}])
    assert all(p.isfinite().all() for p in model.classifier.parameters())
