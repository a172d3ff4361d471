"""MiniGPT: a whole decoder-only Transformer in one file, to be read from top to bottom.

    ids → embedding (+ position) → L × [ x + attention(norm(x)); x + mlp(norm(x)) ] → norm → logits

A model of what the next token is: p(x) = Π_t p(x_t | x_<t), every factor from the same forward pass, because the mask
lets a token see only what came before it. It follows transformers' contracts (attention interface, cache, generation,
checkpointing, Auto classes), so whatever takes a Hugging Face decoder takes this one.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); Radford et al. 2019, GPT-2, for norm placement and initialisation; Su
et al. 2021 (2104.09864) for rotary positions; Press et al. 2021 (2108.12409) for ALiBi; Press and Wolf 2016
(1608.05859) for the tied embedding. Letters: B batch, T tokens, S keys (T and what a cache holds), D hidden, H heads,
K = D / H head dim, V vocabulary, L blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from pelton.errors import SpecError
from pelton.models.minigpt_config import MiniGPTConfig
from pelton.models.positions import alibi, count, refuse_beyond, rotate, rotation, sinusoids


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Computes softmax(q kᵀ / √K + bias + mask) v as it is written (Vaswani et al. 2017, 3.2.1).

    Args:
        module: the attention, for whether it trains.
        query: [B, H, T, K].
        key: [B, H, S, K].
        value: [B, H, S, K].
        attention_mask: 0 where a query may look and a very negative number where not, [B, 1, T, S].
        scaling: 1 / √K.
        dropout: of the weights.
        position_bias: [1, H, T, S], from ALiBi.
        **kwargs: what other attention functions take.

    Returns:
        The output [B, T, H, K] and the weights [B, H, T, S].
    """
    scores = query @ key.transpose(2, 3) * scaling
    for term in (position_bias, attention_mask):
        scores = scores if term is None else scores + term
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2).contiguous(), weights


class MiniGPTAttention(nn.Module):
    """H attentions side by side, each of K = D / H features, and a layer that mixes them."""

    is_causal = True

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        """Builds the four projections; `layer_idx` is the block's place in the cache."""
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        # q · k of independent features of variance 1 has variance K; undivided, the softmax would saturate as K grows.
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        turns: tuple[Tensor, Tensor] | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Lets every token gather from those before it: [B, T, D] → [B, T, D], and the weights where eager."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layer(hidden_states).view(heads).transpose(1, 2) for layer in projections)  # [B, H, T, K]
        if turns is not None:
            query, key = rotate(query, *turns), rotate(key, *turns)
        if past_key_values is not None:  # keys and values of a token never change: later tokens cannot reach it
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, H, S, K]
        if position_bias is not None:
            kwargs["position_bias"] = position_bias.to(query.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class MiniGPTMLP(nn.Module):
    """What a token does with what it gathered: wider, a bend, back."""

    def __init__(self, config: MiniGPTConfig) -> None:
        """Builds both layers."""
        super().__init__()
        assert config.intermediate_size is not None  # the config has filled it in
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps each token by itself: [B, T, D] → [B, T, D]."""
        output: Tensor = self.fc2(self.activation(self.fc1(hidden_states)))
        return output


class MiniGPTBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention, then MLP, each added to the stream of hidden states that runs through all blocks."""

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        """Builds the parts of block `layer_idx`."""
        super().__init__()
        self.self_attn, self.mlp = MiniGPTAttention(config, layer_idx), MiniGPTMLP(config)
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(2))
        self.dropout, self.pre = nn.Dropout(config.dropout), config.norm == "pre"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Maps [B, T, D] to [B, T, D]; the keywords are the attention's."""
        x: Tensor = hidden_states
        if self.pre:  # the stream itself is never normalised: gradients pass every block unchanged
            x = x + self.dropout(self.self_attn(self.norm1(x), **kwargs)[0])
            x = x + self.dropout(self.mlp(self.norm2(x)))
        else:  # the form of 2017: every sum is normalised, gradients too, and training wants a longer warmup
            x = self.norm1(x + self.dropout(self.self_attn(x, **kwargs)[0]))
            x = self.norm2(x + self.dropout(self.mlp(x)))
        return x


class MiniGPTPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers wants to know: loading, initialisation, and what can be recorded."""

    config_class = MiniGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MiniGPTBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MiniGPTBlock, "attentions": MiniGPTAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws weights from N(0, σ²), those that add to the stream from N(0, σ² / 2L) (Radford et al. 2019, 2.3).

        2L sums of one size then leave the stream's variance where one of the full size would.
        """
        super()._init_weights(module)
        std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, MiniGPTAttention):
            init.normal_(module.o_proj.weight, std=std)
        elif isinstance(module, MiniGPTMLP):
            init.normal_(module.fc2.weight, std=std)


class MiniGPTModel(MiniGPTPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: MiniGPTConfig) -> None:
        """Builds embeddings, blocks and the last norm."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MiniGPTBlock(config, index) for index in range(config.num_hidden_layers))
        last = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm == "pre" else nn.Identity()
        self.norm, self.dropout = last, nn.Dropout(config.dropout)
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the blocks: ids [B, T] or embeddings [B, T, D] → hidden states [B, T, D], and the cache.

        Args:
            input_ids: [B, T]; or None, with `inputs_embeds`.
            attention_mask: 1 for tokens and 0 for padding, [B, S]; or a mask of four dimensions, taken as it is.
            position_ids: [B, T]; by default counted from each row's first token, padding left out.
            past_key_values: the keys and values of the tokens before.
            inputs_embeds: [B, T, D] in place of ids.
            use_cache: whether to return keys and values.
            **kwargs: what the attention function takes.

        Raises:
            SpecError: not exactly one of ids and embeddings, or more tokens than learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise SpecError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = count(attention_mask, x.shape[1], seen, x.device)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        keys = x.shape[1] if past_key_values is None else past_key_values.get_mask_sizes(x.shape[1], 0)[0]
        places = self._places(x, position_ids, keys, seen)
        x = self.dropout(self._placed(x, position_ids, seen))
        for block in self.layers:
            x = block(x, attention_mask=mask, past_key_values=past_key_values, **places, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _placed(self, x: Tensor, position_ids: Tensor, seen: int | Tensor) -> Tensor:
        """Adds the positions that are vectors to the embedding [B, T, D]."""
        config = self.config
        if config.positions == "learned":
            refuse_beyond(config.max_position_embeddings, x.shape[1], seen)
            x = x + self.embed_positions(position_ids)
        elif config.positions == "sinusoidal":  # √D: embeddings of the sinusoids' size (Vaswani et al. 2017, 3.4)
            where = sinusoids(position_ids, config.hidden_size, config.rope_base)
            x = x * config.hidden_size**0.5 + where.to(x.dtype)
        return x

    def _places(self, x: Tensor, position_ids: Tensor, keys: int, seen: int | Tensor) -> dict[str, Any]:
        """Returns the positions that act inside the attention, by the name of its argument."""
        config = self.config
        if config.positions == "rotary":
            head_dim = config.hidden_size // config.num_attention_heads
            return {"turns": rotation(position_ids, head_dim, config.rope_base)}
        if config.positions == "alibi":
            return {"position_bias": alibi(x.shape[1], keys, seen, config.num_attention_heads, x.device)}
        return {}


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder with an output layer: a score for every token of the vocabulary to come next."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniGPTConfig) -> None:
        """Builds both; tied, a token's row is its meaning on the way in and on the way out, and counts once."""
        super().__init__(config)
        self.model = MiniGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits [B, T, V] and, with labels, the mean cross-entropy in nats of each next token.

        The arguments are those of `MiniGPTModel.forward`; `labels` are the ids themselves, [B, T], shifted here, −100
        for what is not to be learned; `logits_to_keep` says how many of the last positions get logits (0 for all).
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoConfig.register("minigpt", MiniGPTConfig, exist_ok=True)
AutoModel.register(MiniGPTConfig, MiniGPTModel)
AutoModelForCausalLM.register(MiniGPTConfig, MiniGPTForCausalLM)
