"""Tiny random models of every supported architecture, built in memory, with inputs and what each can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from pelton.models.minigpt import MiniGPTConfig, MiniGPTForCausalLM
from pelton.models.recon import ReconConfig, ReconForSemanticSegmentation, ReconModel

VOCAB, WIDTH, SEQ = 99, 32, 9

TEXT = dict(
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DECODER = TEXT | dict(num_key_value_heads=2)
VISION = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
)
RECON = VISION | dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=24
)
SEQ2SEQ = dict(
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    vocab_size=VOCAB,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture.

    `kind` decides the inputs; `prefix` says whether attention goes through transformers' interface; `windowed` whether
    it runs inside windows of an image; `grid` whether tokens are an image's patches; `causal` whether
    the output has one row per token that may see only what came before; `checkpoints` whether transformers can
    checkpoint it.
    """

    name: str
    make: Callable[[], nn.Module]
    kind: str = "text"
    prefix: bool = True
    windowed: bool = False
    grid: bool = False
    causal: bool = False
    checkpoints: bool = True
    out: Callable[[Any], Tensor] = lambda o: o.logits

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():  # random biases, or nothing tells a bias from none
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.normal_(std=0.1)
        return model

    @property
    def padded(self) -> bool:
        return self.kind in ("text", "seq2seq")

    def inputs(self, batch: int = 3, seed: int = 1) -> dict[str, Tensor]:
        """Rows of different lengths, right-padded; images and sounds are whole."""
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB - 1, (batch, SEQ), generator=g)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, SEQ - 2 * row :] = 0
        text = {"input_ids": ids * mask, "attention_mask": mask}
        if self.kind == "image-text":  # CLIP reads the text at its highest id
            text["input_ids"][torch.arange(batch), mask.sum(1) - 1] = VOCAB - 1
        pixels = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=g)}
        return {
            "text": lambda: text,
            "seq2seq": lambda: text | {"decoder_input_ids": torch.randint(3, VOCAB, (batch, 5), generator=g)},
            "image": lambda: pixels,
            "masked-image": lambda: pixels | {"noise": torch.rand(batch, 16, generator=g)},
            "image-text": lambda: text | pixels,
            "audio": lambda: {
                "input_features": torch.randn(batch, 8, 40, generator=g),
                "decoder_input_ids": torch.randint(3, VOCAB, (batch, 5), generator=g),
            },
        }[self.kind]()

    def run(self, model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
        """What the model says of each row, [B, ...]; rows of padding are zero."""
        out = self.out(model(**inputs, **more))
        if self.kind == "text" and out.dim() == 3:
            out = out * inputs["attention_mask"][..., None]
        return out


def _text(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"{name}ForSequenceClassification")(getattr(tf, f"{name}Config")(**TEXT, **more))


def _decoder(name: str, config: str = "", **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, config or f"{name}Config")(**(DECODER | more)))


def _embeddings(o: Any) -> Tensor:
    return torch.cat([o.text_embeds, o.image_embeds], dim=-1)


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    )


def _minigpt(positions: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: MiniGPTForCausalLM(MiniGPTConfig(positions=positions, **TEXT, **more))


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=VOCAB)
    return tf.DistilBertForSequenceClassification(config)


def _t5() -> nn.Module:
    config = tf.T5Config(
        d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def _swin() -> nn.Module:
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return tf.SwinForImageClassification(config)


def _whisper() -> nn.Module:
    return tf.WhisperModel(
        tf.WhisperConfig(**SEQ2SEQ, max_source_positions=20, max_target_positions=20, num_mel_bins=8)
    )


def _clip() -> nn.Module:
    text = TEXT | dict(projection_dim=16)
    return tf.CLIPModel(
        tf.CLIPConfig(text_config=text, vision_config=VISION | dict(projection_dim=16), projection_dim=16)
    )


def _blip() -> nn.Module:
    text = TEXT | dict(encoder_hidden_size=WIDTH, sep_token_id=2)
    return tf.BlipForImageTextRetrieval(tf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16))


ARCHS = {
    arch.name: arch
    for arch in [
        Arch("bert", _text("Bert")),
        Arch("roberta", _text("Roberta")),
        Arch("electra", _text("Electra", embedding_size=16)),
        Arch("albert", _text("Albert", embedding_size=16), checkpoints=False),
        Arch("distilbert", _distilbert),
        Arch(
            "deberta-v2",
            _text("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16),
            prefix=False,
        ),
        Arch("modernbert", _text("ModernBert", cls_token_id=1, sep_token_id=2)),
        Arch("gpt2", _gpt2, causal=True),
        Arch("llama", _decoder("Llama"), causal=True),
        Arch("mistral", _decoder("Mistral"), causal=True),
        Arch("qwen2", _decoder("Qwen2"), causal=True),
        Arch("qwen3", _decoder("Qwen3", head_dim=8), causal=True),
        Arch(
            "gemma3",
            _decoder("Gemma3", "Gemma3TextConfig", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
            causal=True,
        ),
        Arch("phi3", _decoder("Phi3"), causal=True),
        Arch("minigpt", _minigpt("rotary"), causal=True),
        Arch("minigpt-alibi", _minigpt("alibi", norm="post"), causal=True),
        Arch("minigpt-learned", _minigpt("learned", tie_word_embeddings=False), causal=True),
        Arch("t5", _t5, kind="seq2seq", causal=True),
        Arch("bart", lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)), kind="seq2seq", causal=True),
        Arch("vit", lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)), kind="image", grid=True),
        Arch("swin", _swin, kind="image", windowed=True),
        Arch("dinov2", lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION)), kind="image", grid=True),
        Arch("beit", lambda: tf.BeitForImageClassification(tf.BeitConfig(**VISION)), kind="image", grid=True),
        Arch("recon", lambda: ReconModel(ReconConfig(**RECON)), kind="masked-image", grid=True),
        Arch(
            "recon-segmentation",
            lambda: ReconForSemanticSegmentation(ReconConfig(**RECON, num_labels=3)),
            kind="image",
            grid=True,
        ),
        Arch("whisper", _whisper, kind="audio", causal=True, out=lambda o: o.last_hidden_state),
        Arch("clip", _clip, kind="image-text", out=_embeddings),
        Arch("blip", _blip, kind="image-text", prefix=False, checkpoints=False, out=lambda o: o.itm_score),
    ]
}
