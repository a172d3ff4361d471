"""The sizes and choices of MiniGPT."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pelton.errors import SpecError, unknown

POSITIONS = ("sinusoidal", "learned", "rotary", "alibi")
NORMS = ("pre", "post")


class MiniGPTConfig(PreTrainedConfig):  # type: ignore[misc]
    """The sizes and choices of a MiniGPT.

    Attributes:
        vocab_size: V.
        hidden_size: D; a multiple of the heads.
        num_hidden_layers: L.
        num_attention_heads: H.
        intermediate_size: the width of the MLP; None for 4 · D.
        max_position_embeddings: the length that is trained. Learned positions end there; the others go on.
        positions: "sinusoidal", "learned", "rotary" or "alibi".
        rope_base: the base of the wave lengths of sinusoidal and rotary positions.
        norm: "pre", in front of attention and MLP and once at the end, or "post", behind each residual sum.
        activation: of the MLP, by transformers' name: "gelu" is exact, "gelu_new" is GPT-2's tanh form.
        dropout: of the embedding and of what attention and MLP add.
        attention_dropout: of the attention weights.
        layer_norm_eps: what the norms add to the variance.
        initializer_range: the standard deviation of a fresh weight.
        tie_word_embeddings: whether the output layer is the embedding's own matrix.
        use_cache: whether keys and values are kept for the next token unless said otherwise.
        pad_token_id: of padding.
        bos_token_id: of the beginning of a text.
        eos_token_id: of its end, where generation stops.

    Raises:
        SpecError: sizes that do not fit each other, or a choice that does not exist.
    """

    model_type = "minigpt"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    max_position_embeddings: int = 256
    positions: str = "rotary"
    rope_base: float = 10000.0
    norm: str = "pre"
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills in the width of the MLP, and checks."""
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        for what, name, known in (("positions", self.positions, POSITIONS), ("norm", self.norm, NORMS)):
            if name not in known:
                raise unknown(what, name, known)
        width = 2 * self.num_attention_heads if self.positions == "rotary" else self.num_attention_heads
        if self.hidden_size % width or (self.positions == "sinusoidal" and self.hidden_size % 2):
            raise SpecError(
                f"`hidden_size % num_attention_heads == 0` must hold, with an even number of features per head for "
                f"rotary positions and an even hidden_size for sinusoidal ones, but got (hidden_size="
                f"{self.hidden_size}, num_attention_heads={self.num_attention_heads}, positions={self.positions!r})."
            )
        super().__post_init__(**kwargs)
