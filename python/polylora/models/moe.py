"""Mixture-of-experts decoders on plain attention: qwen3_moe, mixtral, glm4_moe, olmoe, gpt_oss, llama4_text."""

from __future__ import annotations

from .base import ModelTable, TableBuilder, head_dim_of

MODEL_TYPES = ("qwen3_moe", "mixtral", "glm4_moe", "olmoe", "gpt_oss", "llama4_text")


def build(config, fused: bool, prefix: str) -> ModelTable:
    """Table of a mixture-of-experts decoder; ``config`` is the text config."""
    table = TableBuilder(config.model_type, fused, prefix)
    hidden = config.hidden_size
    table.embedding(f"{prefix}embed_tokens", config.vocab_size, hidden)
    for n in range(config.num_hidden_layers):
        layer = f"{prefix}layers.{n}"
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        table.attention(f"{layer}.self_attn", hidden, heads, kv_heads, head_dim_of(config))
        _FEED_FORWARD[config.model_type](table, config, n, layer)
    table.linear("lm_head", hidden, config.vocab_size, "vocab")
    # Mixtral's block was `block_sparse_moe` before transformers 5.
    return table.build(((".block_sparse_moe.", ".mlp."),) if config.model_type == "mixtral" else ())


def _qwen3_moe(table: TableBuilder, config, n: int, layer: str) -> None:
    if n in config.mlp_only_layers or config.num_experts == 0 or (n + 1) % config.decoder_sparse_step:
        table.gated_mlp(f"{layer}.mlp", config.hidden_size, config.intermediate_size)
    else:
        table.experts(f"{layer}.mlp.experts", config.num_experts, config.hidden_size, config.moe_intermediate_size)


def _mixtral(table: TableBuilder, config, n: int, layer: str) -> None:
    table.experts(f"{layer}.mlp.experts", config.num_local_experts, config.hidden_size, config.intermediate_size)


def _glm4_moe(table: TableBuilder, config, n: int, layer: str) -> None:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if n < config.first_k_dense_replace:
        table.gated_mlp(f"{layer}.mlp", hidden, config.intermediate_size)
    else:
        table.experts(f"{layer}.mlp.experts", config.n_routed_experts, hidden, inner)
        table.gated_mlp(f"{layer}.mlp.shared_experts", hidden, inner * config.n_shared_experts)


def _olmoe(table: TableBuilder, config, n: int, layer: str) -> None:
    table.experts(f"{layer}.mlp.experts", config.num_experts, config.hidden_size, config.intermediate_size)


def _gpt_oss(table: TableBuilder, config, n: int, layer: str) -> None:
    table.experts(
        f"{layer}.mlp.experts",
        config.num_local_experts,
        config.hidden_size,
        config.intermediate_size,
        interleaved=True,
        transposed=True,
        peft_transposed=True,
    )


def _llama4(table: TableBuilder, config, n: int, layer: str) -> None:
    hidden, block = config.hidden_size, f"{layer}.feed_forward"
    if n in config.moe_layers:
        table.experts(f"{block}.experts", config.num_local_experts, hidden, config.intermediate_size, transposed=True)
        table.gated_mlp(f"{block}.shared_expert", hidden, config.intermediate_size)
    else:
        table.gated_mlp(block, hidden, config.intermediate_size_mlp)


_FEED_FORWARD = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "glm4_moe": _glm4_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
}
