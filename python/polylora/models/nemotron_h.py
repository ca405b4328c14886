"""Nemotron-H and Nemotron 3: Mamba2, attention, MoE and MLP layers mixed, nothing gated."""

from __future__ import annotations

from .base import ModelTable, Slice, TableBuilder, head_dim_of

MODEL_TYPES = ("nemotron_h",)

# transformers renamed the layer types once; configs of either time are about.
_MAMBA, _ATTENTION = ("mamba", "linear_attention"), ("attention", "full_attention")


def build(config, fused: bool, prefix: str) -> ModelTable:
    """Table of a Nemotron-H decoder."""
    table = TableBuilder(config.model_type, fused, prefix)
    hidden = config.hidden_size
    table.embedding(f"{prefix}embeddings", config.vocab_size, hidden)
    for n, layer_type in enumerate(config.layers_block_type):
        mixer = f"{prefix}layers.{n}.mixer"
        if layer_type in _MAMBA:
            _mamba(table, config, mixer)
        elif layer_type in _ATTENTION:
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            table.attention(mixer, hidden, heads, kv_heads, head_dim_of(config))
        elif layer_type == "moe":
            _moe(table, config, mixer)
        elif layer_type == "mlp":
            table.linear(f"{mixer}.up_proj", hidden, config.intermediate_size)
            table.linear(f"{mixer}.down_proj", config.intermediate_size, hidden, "row")
        else:
            known = (*_MAMBA, *_ATTENTION, "moe", "mlp")
            raise ValueError(f"polylora: nemotron_h: layer {n}: type must be one of {known}, got {layer_type!r}")
    table.linear("lm_head", hidden, config.vocab_size, "vocab")
    return table.build()


def _mamba(table: TableBuilder, config, mixer: str) -> None:
    heads, groups = config.mamba_num_heads, config.n_groups
    inner, state = heads * config.mamba_head_dim, groups * config.ssm_state_size
    slices = [
        Slice("gate", inner, heads),
        Slice("x", inner, heads),
        Slice("B", state, groups),
        Slice("C", state, groups),
        Slice("dt", heads, heads),
    ]
    table.fuse(f"{mixer}.in_proj", config.hidden_size, [(f"{mixer}.in_proj", slices)])
    table.linear(f"{mixer}.out_proj", inner, config.hidden_size, "row")


def _moe(table: TableBuilder, config, mixer: str) -> None:
    hidden, shared = config.hidden_size, config.moe_shared_expert_intermediate_size
    latent = getattr(config, "moe_latent_size", None)
    if latent is not None:
        table.linear(f"{mixer}.fc1_latent_proj", hidden, latent, "replicated")
    width = hidden if latent is None else latent
    table.experts(f"{mixer}.experts", config.n_routed_experts, width, config.moe_intermediate_size, gated=False)
    if latent is not None:
        table.linear(f"{mixer}.fc2_latent_proj", latent, hidden, "replicated")
    table.linear(f"{mixer}.shared_experts.up_proj", hidden, shared)
    table.linear(f"{mixer}.shared_experts.down_proj", shared, hidden, "row")
