"""What the engine benchmark serves: models without weights at published dims, and random PEFT adapters for them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

#: Linears that get no adapter: engines leave them alone, or adapters of these models seldom have them.
LEFT_OUT = ("lm_head", "shared_expert_gate", "in_proj_a", "in_proj_b")


def llama8b(layers: int) -> dict:
    """Llama-3.1-8B's config (32 layers)."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers, "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "bos_token_id": 128000, "eos_token_id": 128009, "rope_theta": 500000.0,
        "rope_scaling": scaling | {"original_max_position_embeddings": 8192},
    }  # fmt: skip


def qwen35moe(layers: int) -> dict:
    """Qwen3.5-35B-A3B's config (40 layers), with a vision tower of one layer, which is not loaded."""
    kinds = ["full_attention" if n % 4 == 3 else "linear_attention" for n in range(layers)]
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    text = {
        "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "hidden_size": 2048, "num_hidden_layers": layers,
        "vocab_size": 248320, "layer_types": kinds, "full_attention_interval": 4, "attn_output_gate": True,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 0,
        "partial_rotary_factor": 0.25, "tie_word_embeddings": False, "eos_token_id": 248044,
        "rope_parameters": rope | {"mrope_interleaved": True, "mrope_section": [11, 11, 10]},
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
        "out_hidden_size": 2048, "num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "in_channels": 3, "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text,
        "vision_config": vision, "tie_word_embeddings": False, "image_token_id": 248056, "video_token_id": 248057,
        "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    }  # fmt: skip


#: Name -> the config and how many layers it has unless told otherwise.
PRESETS = {"llama8b": (llama8b, 32), "qwen35moe": (qwen35moe, 12)}


def write_model(folder: Path, preset: str, layers: int | None = None) -> Path:
    """Writes a preset's ``config.json``; returns the model's folder."""
    config, default = PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers or default), indent=1) + "\n", encoding="utf-8")
    return folder


def write_adapters(folder: Path, model: Path, ranks: Sequence[int], count: int) -> list[Path]:
    """Writes adapters ``a0``, ``a1``, ... of a model's linears and experts; adapter i has rank ``ranks[i % len]``.

    Adapters of one rank share a file on disk and differ by ``lora_alpha``, which engines multiply into B as they load.

    Raises:
        ValueError: the model's family is unknown, or keeps its experts transposed.
    """
    from polylora.models import model_table
    from transformers import AutoConfig

    table = model_table(AutoConfig.from_pretrained(model), fused=False)
    sites = [site for site in table.sites.values() if site.kind != "embedding" and _leaf(site.path) not in LEFT_OUT]
    if any(site.transposed or site.interleaved for site in sites):
        raise ValueError("experts that are stored transposed or interleaved get no random adapters")
    files: dict[int, Path] = {}
    adapters = []
    for i in range(count):
        rank, path = ranks[i % len(ranks)], folder / f"a{i}"
        path.mkdir(parents=True, exist_ok=True)
        weights = path / "adapter_model.safetensors"
        weights.unlink(missing_ok=True)
        if rank in files:
            os.link(files[rank], weights)
        else:
            _write_weights(weights, sites, rank)
            files[rank] = weights
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank + i, "bias": "none",
            "target_modules": sorted({_leaf(site.path) for site in sites if not site.experts}),
            "target_parameters": sorted({".".join(site.path.split(".")[-3:]) for site in sites if site.experts}),
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        adapters.append(path)
    return adapters


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _write_weights(path: Path, sites: Sequence, rank: int) -> None:
    """One PEFT file. Where x has values around 1, B A x has some around 0.3."""
    from safetensors.torch import save_file

    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(rank))
    tensors: dict[str, torch.Tensor] = {}

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        start = 7919 * len(tensors) % pool.numel()  # no two matrices alike
        many = pool.repeat(-(-(start + rows * columns) // pool.numel()))
        return (many[start : start + rows * columns] * scale).to(torch.bfloat16).reshape(rows, columns)

    for site in sites:
        module = site.path
        if site.experts:  # as peft nests two wrapped parameters: gate and up inside, down outside
            module = module.rpartition(".")[0] + (".base_layer" if site.kind == "moe_gate_up" else "")
        rows = rank * (site.experts or 1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw(rows, site.k, 1 / math.sqrt(site.k))
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw(site.width, rows, 0.3 / math.sqrt(rank))
    save_file(tensors, path)
