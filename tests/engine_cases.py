"""Small random models of real families and random PEFT adapters for them, for the engine's tests.

Random weights say nothing about language but everything about agreement: PEFT with one adapter is the reference. What
a person can read is tested on the trained fixtures.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

# Models with convolutions are compared in float32; rounding to TF32 would drown the differences.
torch.backends.cudnn.allow_tf32 = False

VOCAB = 72
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}


def llama_config(**changes) -> transformers.PretrainedConfig:
    values = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, initializer_range=0.2, **TOKENS,
    )  # fmt: skip
    return transformers.LlamaConfig(**{**values, **changes})


def gemma3_config() -> transformers.PretrainedConfig:
    return transformers.Gemma3TextConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, initializer_range=0.2, tie_word_embeddings=True, **TOKENS,
    )  # fmt: skip


def qwen_config(**changes) -> transformers.PretrainedConfig:
    values = dict(
        hidden_size=48, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, linear_num_key_heads=2, linear_key_head_dim=16, linear_num_value_heads=4, linear_value_head_dim=16,
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=56,
        tie_word_embeddings=False, initializer_range=0.2, **TOKENS,
    )  # fmt: skip
    return transformers.Qwen3_5MoeTextConfig(**{**values, **changes})


def nemotron_config() -> transformers.PretrainedConfig:
    return transformers.NemotronHConfig(
        hidden_size=48, hybrid_override_pattern="ME*-", num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=88, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=24, chunk_size=16,
        n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=56, moe_latent_size=40,
        moe_shared_expert_intermediate_size=72, routed_scaling_factor=1.5, initializer_range=0.2,
        tie_word_embeddings=False, **TOKENS,
    )  # fmt: skip


def deepseek_config() -> transformers.PretrainedConfig:
    return transformers.DeepseekV3Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        n_routed_experts=8, num_local_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=40, initializer_range=0.2, tie_word_embeddings=False, **TOKENS,
    )  # fmt: skip


def gpt_oss_config() -> transformers.PretrainedConfig:
    return transformers.GptOssConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=6, num_experts_per_tok=2, initializer_range=0.2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **TOKENS,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model to try, and what peft can adapt in it."""

    config: object
    linears: Sequence[str]
    experts: Sequence[str] = ()
    embedding: str = "embed_tokens"
    heads: Sequence[str] = field(default=("lm_head",))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
GATED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

FAMILIES = {
    "llama": Family(llama_config, ATTENTION + MLP),
    "gemma3": Family(gemma3_config, ATTENTION + MLP),
    "qwen3_5_moe": Family(
        qwen_config,
        [*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", *MLP, "shared_expert_gate"],
        GATED_EXPERTS,
    ),
    "nemotron_h": Family(
        nemotron_config,
        [*ATTENTION, "in_proj", "up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"],
        ["mixer.experts.up_proj", "mixer.experts.down_proj"],
        embedding="embeddings",
    ),
    "deepseek_v3": Family(
        deepseek_config,
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP],
        GATED_EXPERTS,
    ),
    "gpt_oss": Family(gpt_oss_config, ATTENTION, GATED_EXPERTS),
}

# name -> (what it targets of a family, LoraConfig arguments)
ADAPTERS = {
    "everything": {"parts": ("linears", "experts", "embedding", "heads"), "r": 5, "lora_alpha": 9},
    "linears": {"parts": ("linears",), "r": 12, "lora_alpha": 7, "use_rslora": True},
    "experts": {"parts": ("experts",), "r": 3, "lora_alpha": 8},
    "q_and_ends": {"parts": ("first", "embedding", "heads"), "r": 16, "lora_alpha": 24},
}


def adapter_names(family: str) -> list[str]:
    return [name for name in ADAPTERS if FAMILIES[family].experts or name != "experts"]


def make_model(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes):
    """A model of the family with the same random weights every time, rounded to ``dtype``."""
    torch.manual_seed(1234)
    config = FAMILIES[family].config(**changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Some classes leave parameters empty, and zero biases hide mistakes with them.
            if parameter.ndim == 3 or "bias" in name:
                parameter.normal_(0, 0.2)
    model = model.to(dtype)
    # Adapters are compared in every dtype from the same weights.
    return model.to(device).requires_grad_(False)


def _peft_config(family: str, name: str) -> peft.LoraConfig:
    spec, arguments = FAMILIES[family], dict(ADAPTERS[name])
    parts = arguments.pop("parts")
    modules = [m for m, part in (
        (list(spec.linears), "linears"), (list(spec.linears[:1]), "first"), ([spec.embedding], "embedding"),
        (list(spec.heads), "heads"),
    ) if part in parts]  # fmt: skip
    parameters = list(spec.experts) if "experts" in parts else None
    return peft.LoraConfig(
        target_modules=sum(modules, []), target_parameters=parameters or None, init_lora_weights=False, **arguments
    )


@functools.cache
def adapter_folder(family: str, name: str) -> Path:
    """A PEFT folder with a random adapter, written by peft itself. Its deltas are a sizeable part of the output."""
    root = Path(tempfile.mkdtemp(prefix=f"polylora-{family}-{name}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make_model(family), _peft_config(family, name))
        generator = torch.Generator().manual_seed(sum(map(ord, family + name)))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    bound = 0.35 if "embedding" in key else 0.12
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * bound)
        model.save_pretrained(root, save_embedding_layers=False)
    return root


def peft_model(family: str, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(
            make_model(family, dtype, device, **changes), adapter_folder(family, name)
        ).eval()


@torch.no_grad()
def logits_of(model, batch: dict[str, Tensor], **kwargs) -> Tensor:
    return model(**batch, use_cache=False, **kwargs).logits.float()


def left_padded(lengths: Sequence[int], device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = torch.where(mask.bool(), ids, 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
