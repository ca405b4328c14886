"""Qwen3.5 and Qwen3-Next: three gated-delta-net layers, then one of full attention; dense or MoE."""

from __future__ import annotations

from .base import ModelTable, Slice, TableBuilder, head_dim_of

MODEL_TYPES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


def build(config, fused: bool, prefix: str) -> ModelTable:
    """Table of a Qwen3.5 or Qwen3-Next decoder; ``config`` is the text config."""
    table = TableBuilder(config.model_type, fused, prefix)
    hidden = config.hidden_size
    table.embedding(f"{prefix}embed_tokens", config.vocab_size, hidden)
    # q carries the output gate beside it, head by head; some configs have no key for it because it is always on.
    q_factor = 2 if getattr(config, "attn_output_gate", True) else 1
    for n, layer_type in enumerate(config.layer_types):
        layer = f"{prefix}layers.{n}"
        if layer_type == "linear_attention":
            _delta_net(table, config, f"{layer}.linear_attn")
        else:
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            table.attention(f"{layer}.self_attn", hidden, heads, kv_heads, head_dim_of(config), q_factor)
        if _is_sparse(config, n):
            table.experts(f"{layer}.mlp.experts", config.num_experts, hidden, config.moe_intermediate_size)
            table.gated_mlp(f"{layer}.mlp.shared_expert", hidden, config.shared_expert_intermediate_size)
            table.linear(f"{layer}.mlp.shared_expert_gate", hidden, 1, "replicated")
        else:
            table.gated_mlp(f"{layer}.mlp", hidden, config.intermediate_size)
    table.linear("lm_head", hidden, config.vocab_size, "vocab")
    return table.build()


def _is_sparse(config, layer: int) -> bool:
    if config.model_type == "qwen3_next":
        sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        return sparse and layer not in config.mlp_only_layers
    return config.model_type == "qwen3_5_moe_text"


def _delta_net(table: TableBuilder, config, path: str) -> None:
    hidden = config.hidden_size
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key, value = config.linear_key_head_dim * key_heads, config.linear_value_head_dim * value_heads
    if config.model_type == "qwen3_next":
        # Trained fused, and ordered by key head (q, k, v, z of head 0, then of head 1, ...). Engines keep that order
        # in the module's output, so to LoRA it is one slice.
        table.linear(f"{path}.in_proj_qkvz", hidden, 2 * key + 2 * value, units=key_heads)
        table.linear(f"{path}.in_proj_ba", hidden, 2 * value_heads, units=key_heads)
    else:
        qkv = [Slice("q", key, key_heads), Slice("k", key, key_heads), Slice("v", value, value_heads)]
        table.fuse(
            f"{path}.in_proj_qkvz",
            hidden,
            [(f"{path}.in_proj_qkv", qkv), (f"{path}.in_proj_z", [Slice("z", value, value_heads)])],
        )
        table.fuse(
            f"{path}.in_proj_ba",
            hidden,
            [(f"{path}.in_proj_{name}", [Slice(name, value_heads, value_heads)]) for name in ("b", "a")],
        )
    table.linear(f"{path}.out_proj", value, hidden, "row")
