"""A classifier for any encoder: the mean of the last hidden states, dropout, one linear layer.

Encoders that were trained with mean pooling (sentence transformers) have a better sentence vector in the mean than in
their [CLS] token. Shapes: B batch, T tokens, D hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

TINY = 1e-12
"""Of squared distances: features that are all alike still give numbers."""
EQUAL = 1e-3
"""Of the length of features, by how much those of one text may differ."""
HALVINGS = 30
"""Of a range of four powers of ten, which leaves less than a millionth of it."""


class MeanPoolingClassifier(PreTrainedModel):  # type: ignore[misc]
    """Any `AutoModel` under masked mean pooling and a linear classifier.

    Saves and loads as transformers' own models do: the encoder's weights are under `backbone.`.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # Whatever the encoder supports has been settled by the time it is wrapped.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, backbone: PreTrainedModel | None = None) -> None:
        """Wraps `backbone`, or a new one made from `config` (its weights are then loaded by `from_pretrained`)."""
        backbone = AutoModel.from_config(config) if backbone is None else backbone
        super().__init__(config)
        self.backbone = backbone
        self.dropout = nn.Dropout(_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, dtype=backbone.dtype)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *arguments: Any, **options: Any) -> Self:
        """Loads what `save_pretrained` wrote; the encoder's architecture is read from its config."""
        options.setdefault("config", AutoConfig.from_pretrained(folder))
        return cast(Self, super().from_pretrained(folder, *arguments, **options))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Classifies each row.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding; all ones when None.
            labels: [B] ids of classes, judged by their mean cross-entropy; or numbers, by their mean squared error,
                where the config's `problem_type` is "regression".
            **inputs: What else the encoder takes (`token_type_ids`, `inputs_embeds`, `output_attentions` …).
        """
        inputs["return_dict"] = True
        encoded = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        pooled = mean_pool(encoded.last_hidden_state, attention_mask)  # [B, D]
        logits = self.classifier(self.dropout(pooled))  # [B, C]
        loss = None if labels is None else self._loss(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.get("hidden_states"), attentions=encoded.get("attentions")
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type == "regression":
            return nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)

    @torch.no_grad()
    def start_from_class_means(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Sets the classifier to that of the nearest class mean, by squared Euclidean distance.

            logit_k = s · (⟨f, μ_k − μ⟩ + c_k),    −s/2 · |f − μ_k|² but for what is the same for all classes

        With few examples a random head spends its first steps distorting pretrained features (Kumar et al. 2022,
        arXiv 2202.10054); class means start where prototypical networks do (Snell et al. 2017, arXiv 1703.05175,
        section 2.4). s is the one at which examples that are left out of their own mean have the least cross-entropy,
        so that a head whose means do not tell classes apart starts near 0; and at most the one at which an example at
        its mean exceeds the average by 4, since a head that starts surer leaves the encoder less to learn
        (`docs/design-notes.md`). A class without examples keeps its random row.

        Args:
            batches: `input_ids`, `attention_mask` and `labels` [B] of the training examples.
        """
        was_training = self.training
        self.eval()
        features, labels = [], []
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            hidden = self.backbone(**inputs, return_dict=True).last_hidden_state
            features.append(mean_pool(hidden, batch.get("attention_mask")).float())
            labels.append(batch["labels"])
        f, y = torch.cat(features), torch.cat(labels)  # [N, D], [N]
        seen, y = torch.unique(y, return_inverse=True)
        means = torch.stack([f[y == k].mean(dim=0) for k in range(len(seen))])  # [C, D]
        center = f.mean(dim=0)
        offsets = means - center
        usual = 4.0 / offsets.square().sum(dim=1).mean().clamp_min(TINY)  # a margin of 4 at the mean
        scale = _calibrated_scale(f - center, y, offsets, usual)
        bias = -scale * (offsets.square().sum(dim=1) / 2 + offsets @ center)
        self.classifier.weight[seen] = (scale * offsets).to(self.classifier.weight.dtype)
        self.classifier.bias[seen] = bias.to(self.classifier.bias.dtype)
        self.train(was_training)


def _calibrated_scale(f: Tensor, y: Tensor, means: Tensor, usual: Tensor) -> Tensor:
    """Returns the s at which −s/2 · |f − μ_k|² has the least cross-entropy, each f left out of its own class's mean.

    The cross-entropy is convex in s: its slope, that of ½ (d_y − Σ_k p_k d_k), is searched for its zero, between logits
    of an example that differ by a hundredth and by a hundred.

    Args:
        f: [N, D].
        y: [N] rows of `means`.
        means: [C, D] μ_k.
        usual: The largest that is returned, and what is taken where no class has two different examples.
    """
    count, copies = torch.bincount(y)[y], _copies(f, y)  # [N]
    d = torch.cdist(f, means).square()  # [N, C]
    own = y.unsqueeze(1)
    # f − μ without f and its m − 1 copies is (f − μ) · n / (n − m).
    d.scatter_(1, own, d.gather(1, own) * (count / (count - copies).clamp_min(1)).square().unsqueeze(1))
    left = count > copies
    d, own = d[left], own[left]
    if not len(d):
        return usual
    differ = (d.std(dim=1, correction=0).mean() / 2).clamp_min(TINY)  # of an example's logits, at s = 1
    low, high = (bound.log() for bound in (0.01 / differ, 100.0 / differ))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        p = torch.softmax(-middle.exp() / 2 * d, dim=1)
        rises = (d.gather(1, own).squeeze(1) - (p * d).sum(dim=1)).mean() > 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return torch.minimum(high.exp(), usual)


def _copies(f: Tensor, y: Tensor) -> Tensor:
    """Counts for each example those of its class with the same features, itself included, [N].

    Along a random direction equal features are neighbours. Where padding differs, they are only nearly equal.
    """
    line = f @ torch.randn(f.shape[1], generator=torch.Generator().manual_seed(0)).to(f.device)
    order = line.argsort()
    order = order[y[order].argsort(stable=True)]
    sorted_f, sorted_y = f[order], y[order]
    apart = (sorted_f[1:] - sorted_f[:-1]).norm(dim=1) > EQUAL * f.norm(dim=1).mean()
    new = apart | (sorted_y[1:] != sorted_y[:-1])
    group = torch.cat([new.new_zeros(1), new]).cumsum(dim=0)
    copies = torch.empty_like(y)
    copies[order] = torch.bincount(group)[group]
    return copies


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Averages hidden states [B, T, D] over the tokens that `mask` [B, T] lets through, in float32."""
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.unsqueeze(-1).to(torch.float32)  # [B, T, 1]
    total = (hidden.float() * weights).sum(dim=1)
    return (total / weights.sum(dim=1).clamp(min=1.0)).to(hidden.dtype)


def _dropout(config: PreTrainedConfig) -> float:
    """Returns the classifier's dropout under the names that configurations use for it."""
    for name in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout", "hidden_dropout"):
        value = getattr(config, name, None)
        if isinstance(value, float):
            return value
    return 0.1
