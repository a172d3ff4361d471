"""Many more architectures, tiny and random, by the config that transformers builds them from.

`zoo.py` has the rows on which every law is tested; these are tested on what an architecture can get wrong: where its
blocks are, what its attention sees, how its layers lay out tokens.
"""

from __future__ import annotations

from typing import Any

VOCAB = 60
TEXT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, pad_token_id=1
)
GROUPED = TEXT | dict(num_key_value_heads=2)
WIDE_HEADS = GROUPED | dict(head_dim=8)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
BART = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=64,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
)
T5 = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=1
)
MOE = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
LATENT = TEXT | dict(
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    first_k_dense_replace=1,
)
FALCON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
XLM = dict(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, pad_index=1)
STREAMS = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_encoder_attention_heads=4,
    num_decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=64,
    pad_token_id=1,
    decoder_start_token_id=2,
)

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", GROUPED),
    "bert-decoder": ("Bert", TEXT | dict(is_decoder=True)),
    "biogpt": ("BioGpt", TEXT),
    "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "codegen": ("CodeGen", GPT | dict(rotary_dim=4)),
    "cohere2": ("Cohere2", GROUPED),
    "ctrl": ("CTRL", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, dff=40, n_positions=64)),
    "deepseek-v2": ("DeepseekV2", LATENT),
    "deepseek-v3": ("DeepseekV3", LATENT),
    "doge": ("Doge", GROUPED),
    "ernie4.5": ("Ernie4_5", WIDE_HEADS),
    "exaone4": ("Exaone4", GROUPED),
    "falcon": ("Falcon", FALCON),
    "falcon-grouped": ("Falcon", FALCON | dict(num_kv_heads=2, new_decoder_architecture=True)),
    "gemma2": ("Gemma2", WIDE_HEADS),
    "git": ("Git", TEXT),
    "glm4": ("Glm4", WIDE_HEADS),
    "gpt-bigcode": ("GPTBigCode", GPT),
    "gpt-j": ("GPTJ", GPT | dict(rotary_dim=4)),
    "gpt-neo": (
        "GPTNeo",
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            max_position_embeddings=64,
        ),
    ),
    "gpt-neox": ("GPTNeoX", TEXT),
    "gpt-oss": ("GptOss", WIDE_HEADS | dict(num_local_experts=4, num_experts_per_tok=2)),
    "granite": ("Granite", GROUPED),
    "jamba": (
        "Jamba",
        GROUPED
        | dict(num_experts=2, use_mamba_kernels=False, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1),
    ),
    "lfm2": ("Lfm2", GROUPED),
    "llama4": ("Llama4Text", WIDE_HEADS | dict(num_local_experts=2, intermediate_size_mlp=40)),
    "mixtral": ("Mixtral", GROUPED | dict(num_local_experts=4)),
    "mpt": ("Mpt", dict(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "nemotron": ("Nemotron", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo-hybrid": ("OlmoHybrid", GROUPED),
    "openai-gpt": ("OpenAIGPT", GPT),
    "opt": (
        "OPT",
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=40,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            pad_token_id=1,
        ),
    ),
    "persimmon": ("Persimmon", TEXT),
    "phi": ("Phi", TEXT),
    "qwen2-moe": ("Qwen2Moe", GROUPED | MOE | dict(shared_expert_intermediate_size=24)),
    "qwen3-moe": ("Qwen3Moe", WIDE_HEADS | MOE),
    "smollm3": ("SmolLM3", GROUPED),
    "stablelm": ("StableLm", TEXT | dict(num_key_value_heads=4)),
    "starcoder2": ("Starcoder2", GROUPED),
    "trocr": (
        "TrOCR",
        dict(
            vocab_size=VOCAB,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            pad_token_id=1,
            cross_attention_hidden_size=32,
        ),
    ),
    "xglm": (
        "XGLM",
        dict(
            vocab_size=VOCAB,
            d_model=32,
            num_layers=2,
            attention_heads=4,
            ffn_dim=40,
            max_position_embeddings=64,
            pad_token_id=1,
        ),
    ),
}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "big-bird": ("BigBird", TEXT | dict(attention_type="original_full")),
    "convbert": ("ConvBert", TEXT | dict(embedding_size=32, conv_kernel_size=3, head_ratio=2)),
    "deberta": ("Deberta", TEXT),
    "esm": ("Esm", TEXT | dict(mask_token_id=3, position_embedding_type="rotary")),
    "eurobert": ("EuroBert", TEXT),
    "flaubert": ("Flaubert", XLM),
    "layoutlm": ("LayoutLM", TEXT),
    "longformer": ("Longformer", TEXT | dict(attention_window=4)),
    "megatron-bert": ("MegatronBert", TEXT),
    "mobilebert": (
        "MobileBert",
        TEXT | dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    ),
    "mpnet": ("MPNet", TEXT),
    "rembert": ("RemBert", TEXT | dict(input_embedding_size=32, output_embedding_size=32)),
    "roformer": ("RoFormer", TEXT | dict(embedding_size=32)),
    "xlm": ("XLM", XLM),
    "xlm-roberta-xl": ("XLMRobertaXL", TEXT),
}

SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "bigbird-pegasus": ("BigBirdPegasus", BART | dict(attention_type="original_full")),
    "fsmt": (
        "FSMT",
        dict(langs=["a", "b"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB)
        | {key: value for key, value in BART.items() if key != "vocab_size"},
    ),
    "led": (
        "LED",
        BART | dict(max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4),
    ),
    "longt5": ("LongT5", T5 | dict(local_radius=3)),
    "longt5-global": (
        "LongT5",
        T5 | dict(local_radius=3, encoder_attention_type="transient-global", global_block_size=4),
    ),
    "m2m-100": ("M2M100", BART),
    "marian": ("Marian", BART),
    "mvp": ("Mvp", BART),
    "nllb-moe": (
        "NllbMoe",
        BART | dict(num_experts=2, expert_capacity=64, encoder_sparse_step=2, decoder_sparse_step=2),
    ),
    "pegasus-x": ("PegasusX", BART | dict(block_size=4, num_global_tokens=2)),
    "switch-transformers": ("SwitchTransformers", T5 | dict(num_experts=2)),
    "umt5": ("UMT5", T5),
}

STATIC = ("longformer", "fsmt", "led", "longt5-global", "pegasus-x")
"""Layers there do not see tokens as gates would: only gates that do not read the input can stand there."""

REFUSED = {
    "prophetnet": ("ProphetNet", STREAMS, "runs several streams through each layer"),
    "ibert": ("IBert", TEXT, "its layers give integers and their scale"),
    "big-bird-sparse": ("BigBird", TEXT | dict(attention_type="block_sparse"), "attention_type='original_full'"),
    "fnet": (
        "FNet",
        dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=40),
        "No transformer blocks are known in FNetModel",
    ),
    "luke": (
        "Luke",
        TEXT | dict(entity_vocab_size=20, entity_emb_size=16),
        "its layers see other tokens than its attention's input has",
    ),
    "mamba": ("Mamba", dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "No transformer blocks are known"),
}
"""What nothing can be attached to, and what is said."""
