"""Dense decoders of the Llama shape: llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, olmo2."""

from __future__ import annotations

from .base import ModelTable, Slice, TableBuilder, head_dim_of

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")


def build(config, fused: bool, prefix: str) -> ModelTable:
    """Table of a dense decoder; ``config`` is the text config."""
    table = TableBuilder(config.model_type, fused, prefix)
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, head_dim_of(config)
    kv_heads = config.num_key_value_heads
    # Gemma's embedding module multiplies by sqrt(hidden) itself, and peft does the same to the adapter's part.
    scale = hidden**0.5 if config.model_type.startswith("gemma") else 1.0
    table.embedding(f"{prefix}embed_tokens", config.vocab_size, hidden, scale)
    for n in range(config.num_hidden_layers):
        attention, mlp = f"{prefix}layers.{n}.self_attn", f"{prefix}layers.{n}.mlp"
        if config.model_type == "phi3":
            _phi3_layer(table, attention, mlp, hidden, heads, kv_heads, head_dim, config.intermediate_size)
        else:
            table.attention(attention, hidden, heads, kv_heads, head_dim)
            table.gated_mlp(mlp, hidden, config.intermediate_size)
    table.linear("lm_head", hidden, config.vocab_size, "vocab")
    return table.build()


def _phi3_layer(
    table: TableBuilder, attention: str, mlp: str, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int
) -> None:
    # Phi-3 trains the fused modules themselves: one A for all slices.
    kv = kv_heads * head_dim
    qkv = [Slice("q", heads * head_dim, heads), Slice("k", kv, kv_heads), Slice("v", kv, kv_heads)]
    table.fuse(f"{attention}.qkv_proj", hidden, [(f"{attention}.qkv_proj", qkv)])
    table.linear(f"{attention}.o_proj", heads * head_dim, hidden, "row")
    table.fuse(f"{mlp}.gate_up_proj", hidden, [(f"{mlp}.gate_up_proj", [Slice("gate", inner), Slice("up", inner)])])
    table.linear(f"{mlp}.down_proj", inner, hidden, "row")
