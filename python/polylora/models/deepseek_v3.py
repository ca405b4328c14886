"""DeepSeek V2 and V3 and their like (Kimi K2, GLM-5): multi-head latent attention, dense layers, then MoE."""

from __future__ import annotations

from .base import ModelTable, Slice, TableBuilder

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm_moe_dsa")


def build(config, fused: bool, prefix: str) -> ModelTable:
    """Table of a DeepSeek decoder; ``config`` is the text config."""
    table = TableBuilder(config.model_type, fused, prefix)
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    table.embedding(f"{prefix}embed_tokens", config.vocab_size, hidden)
    for n in range(config.num_hidden_layers):
        layer = f"{prefix}layers.{n}"
        _latent_attention(table, config, f"{layer}.self_attn")
        if config.model_type == "glm_moe_dsa" and config.indexer_types[n] == "full":
            _indexer(table, config, f"{layer}.self_attn.indexer")
        if _is_dense(config, n):
            table.gated_mlp(f"{layer}.mlp", hidden, config.intermediate_size)
        else:
            table.experts(f"{layer}.mlp.experts", config.n_routed_experts, hidden, inner)
            table.gated_mlp(f"{layer}.mlp.shared_experts", hidden, inner * config.n_shared_experts)
    table.linear("lm_head", hidden, config.vocab_size, "vocab")
    return table.build()


def _is_dense(config, layer: int) -> bool:
    if config.model_type == "glm_moe_dsa":
        return config.mlp_layer_types[layer] != "sparse"
    return layer < config.first_k_dense_replace


def _indexer(table: TableBuilder, config, path: str) -> None:
    """Sparse attention's choice of tokens: every rank makes it whole."""
    hidden, heads, head_dim = config.hidden_size, config.index_n_heads, config.index_head_dim
    table.linear(f"{path}.wq_b", config.q_lora_rank, heads * head_dim, "replicated")
    table.linear(f"{path}.wk", hidden, head_dim, "replicated")
    table.linear(f"{path}.weights_proj", hidden, heads, "replicated")


def _latent_attention(table: TableBuilder, config, path: str) -> None:
    """MLA: the two down-projections run fused and uncut, their outputs are what every rank's heads read."""
    hidden, heads, kv_rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    kv_a = (f"{path}.kv_a_proj_with_mqa", kv_rank + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        table.linear(f"{path}.q_proj", hidden, q, units=heads)
        table.linear(kv_a[0], hidden, kv_a[1], "replicated")
    else:
        table.fuse(
            f"{path}.fused_qkv_a_proj_with_mqa",
            hidden,
            [
                (f"{path}.q_a_proj", [Slice("q_a", config.q_lora_rank)]),
                (kv_a[0], [Slice("kv_a", kv_a[1])]),
            ],
            "replicated",
        )
        table.linear(f"{path}.q_b_proj", config.q_lora_rank, q, units=heads)
    kv_b = heads * (config.qk_nope_head_dim + config.v_head_dim)
    table.linear(f"{path}.kv_b_proj", kv_rank, kv_b, units=heads)
    table.linear(f"{path}.o_proj", heads * config.v_head_dim, hidden, "row")
