"""Every family's table against the modules of the real Hugging Face class, built on the meta device."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from polylora.models import UnknownModelError, known_model_types, model_table

transformers = pytest.importorskip("transformers")

# Odd and unequal on purpose: no two widths of a layer coincide by accident.
PLAIN = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 99,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# For classes that take the head width from hidden size over heads.
DERIVED = {**{k: v for k, v in PLAIN.items() if k != "head_dim"}, "hidden_size": 48}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA_NET = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN_MOE = {**PLAIN, **DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 36}
NEMOTRON = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 99,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 36,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 10,
    # M mamba, E experts, * attention, - MLP
    "hybrid_override_pattern": "ME*-",
}
DEEPSEEK = {
    **PLAIN,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "q_lora_rank": 18,
    "kv_lora_rank": 22,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
}
DEEPSEEK.pop("head_dim")

CASES = {
    "llama": ("llama", PLAIN),
    "mistral": ("mistral", PLAIN),
    "qwen2": ("qwen2", DERIVED),
    "qwen3": ("qwen3", PLAIN),
    "gemma2": ("gemma2", PLAIN),
    "gemma3_text": ("gemma3_text", PLAIN),
    "phi3": ("phi3", DERIVED),
    "olmo2": ("olmo2", DERIVED),
    "llama_tied": ("llama", {**PLAIN, "tie_word_embeddings": True}),
    "qwen3_5_text": ("qwen3_5_text", {**PLAIN, **DELTA_NET}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", QWEN_MOE),
    "qwen3_next": ("qwen3_next", {**QWEN_MOE, "mlp_only_layers": [1]}),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "nemotron_h_latent": ("nemotron_h", {**NEMOTRON, "moe_latent_size": 20}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3_plain_q": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": None}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {
            **DEEPSEEK,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "indexer_types": ["full", "shared", "full"],
            "index_n_heads": 3,
            "index_head_dim": 16,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**PLAIN, **EXPERTS, "mlp_only_layers": [0]}),
    "mixtral": ("mixtral", {**PLAIN, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "glm4_moe",
        {**PLAIN, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 2},
    ),
    "olmoe": ("olmoe", {**DERIVED, "num_experts": 3, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**PLAIN, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "llama4_text": (
        "llama4_text",
        {**PLAIN, "num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 72, "moe_layers": [1]},
    ),
}
CASES["glm4_moe"][1].pop("num_experts")

# Published dims of the two models the package exists for; layers cut to one period, the widths are what counts.
CASES["Qwen3.5-35B-A3B"] = (
    "qwen3_5_moe_text",
    {
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 248320,
    },
)
CASES["Nemotron-3-Super"] = (
    "nemotron_h",
    {
        "hidden_size": 4096,
        "moe_latent_size": 1024,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "vocab_size": 131072,
        "hybrid_override_pattern": "MEM*",
    },
)

# Weights with two or more dimensions that are no site, by the last parts of their names, and why.
NOT_A_SITE = {
    "gate.weight": "router: top-k is discrete, engines keep it unadapted",
    "router.weight": "router",
    "conv1d.weight": "depthwise convolution, not a product",
    "experts.gate_up_proj_bias": "bias of the experts",
    "experts.down_proj_bias": "bias of the experts",
    "self_attn.sinks": "no product",
}


def build(case: str):
    model_type, values = CASES[case]
    if model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    config = transformers.AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return build(request.param)


def weights(model) -> dict[str, tuple[str, torch.nn.Parameter]]:
    """Module path (expert parameters: parameter path) -> what it is and its weight, for all that can be adapted."""
    found = {}
    # Tied weights appear under each of their names: the modules are what is adapted.
    for name, param in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if any(name.endswith(f".{suffix}") for suffix in NOT_A_SITE) or param.ndim < 2:
            continue
        module = model.get_submodule(owner)
        if leaf == "weight":
            found[owner] = ("embedding" if isinstance(module, torch.nn.Embedding) else "linear", param)
        else:
            found[name] = ("experts", param)
    return found


def check_unfused(model, table):
    """Raise AssertionError where the table and the model differ."""
    real = weights(model)
    assert set(real) == set(table.sites)
    for path, (kind, weight) in real.items():
        site = table.sites[path]
        assert [s.path for s in site.sources] == [path]
        if kind == "experts":
            out, k = (2, 1) if site.transposed else (1, 2)
            assert site.kind == ("moe_down" if path.endswith("down_proj") else "moe_gate_up")
            assert (site.experts, site.width, site.k) == (weight.shape[0], weight.shape[out], weight.shape[k])
            assert site.gated == (len(site.slices) == 2)
            owner = model.get_submodule(path.rpartition(".")[0])
            assert getattr(owner, "is_transposed", False) == site.peft_transposed
            if site.gated:
                assert getattr(owner, "is_concatenated", True) != site.interleaved
        elif kind == "embedding":
            assert (site.kind, site.k, site.width) == ("embedding", *weight.shape)
            module = model.get_submodule(path)
            scale = getattr(module, "scalar_embed_scale", 40**0.5 if hasattr(module, "embed_scale") else 1.0)
            assert site.output_scale == pytest.approx(scale)
        else:
            assert (site.kind, site.width, site.k) == ("linear", *weight.shape)
            assert isinstance(model.get_submodule(path), torch.nn.Linear)
        if kind != "experts":
            assert len(site.slices) == 1 and site.experts == 0


def test_unfused_is_the_model(model):
    check_unfused(model, model_table(model, fused=False))
    # From the config alone the same comes out; but where Gemma 2 scales is up to the version of transformers.
    if model.config.model_type != "gemma2":
        assert model_table(model.config, fused=False) == model_table(model, fused=False)


def test_fused_covers_the_same(model):
    fused, single = model_table(model, fused=True), model_table(model, fused=False)
    sources = [source.path for site in fused.sites.values() for source in site.sources]
    assert sorted(sources) == sorted(single.sites)
    for site in fused.sites.values():
        widths = {s.name: s.width for s in site.slices}
        # Every slice is fed once, and each source brings as many rows as its module has.
        assert [name for source in site.sources for name in source.slices] == [s.name for s in site.slices]
        for source in site.sources:
            assert single.sites[source.path].k == site.k
            assert single.sites[source.path].width == sum(widths[name] for name in source.slices)
            assert fused.feeds[source.path] == tuple((site.path, list(widths).index(n)) for n in source.slices)
    # Whatever one table can be fed, the other can, and every row has a place.
    assert set(fused.feeds) == set(single.feeds)
    for path in fused.feeds:
        rows = [sum(t.sites[s].slices[i].width for s, i in t.feeds[path]) for t in (fused, single)]
        assert rows[0] == rows[1]


def test_parts_cover_the_width(model):
    for fused in (True, False):
        for site in model_table(model, fused).sites.values():
            for piece in site.slices:
                assert sum(part.width for part in piece.cuts) == piece.width
                assert all(part.width % (part.units or 1) == 0 for part in piece.cuts)


@pytest.mark.parametrize("place", ["model.layers.0.mlp", "model.layers.1.self_attn", "model"])
def test_a_new_linear_is_noticed(place):
    model = build("qwen3")
    model.get_submodule(place).surprise = torch.nn.Linear(3, 5, device="meta")
    with pytest.raises(AssertionError, match="surprise"):
        check_unfused(model, model_table(model, fused=False))


def test_a_new_expert_parameter_is_noticed():
    model = build("qwen3_moe")
    model.model.layers[1].mlp.experts.surprise = torch.nn.Parameter(torch.empty(3, 4, 5, device="meta"))
    with pytest.raises(AssertionError, match="surprise"):
        check_unfused(model, model_table(model, fused=False))


SLICES = {
    # Facts the engines agree on, at the published sizes.
    ("Qwen3.5-35B-A3B", "layers.0.linear_attn.in_proj_qkvz"): [("q", 2048), ("k", 2048), ("v", 4096), ("z", 4096)],
    ("Qwen3.5-35B-A3B", "layers.0.linear_attn.in_proj_ba"): [("b", 32), ("a", 32)],
    ("Qwen3.5-35B-A3B", "layers.3.self_attn.qkv_proj"): [("q", 8192), ("k", 512), ("v", 512)],
    ("Qwen3.5-35B-A3B", "layers.0.mlp.experts.gate_up_proj"): [("gate", 512), ("up", 512)],
    ("Nemotron-3-Super", "layers.0.mixer.in_proj"): [
        ("gate", 8192),
        ("x", 8192),
        ("B", 1024),
        ("C", 1024),
        ("dt", 128),
    ],
    ("Nemotron-3-Super", "layers.1.mixer.experts.up_proj"): [("up", 2688)],
    ("deepseek_v3", "layers.0.self_attn.fused_qkv_a_proj_with_mqa"): [("q_a", 18), ("kv_a", 30)],
    ("phi3", "layers.0.self_attn.qkv_proj"): [("q", 48), ("k", 24), ("v", 24)],
    ("gpt_oss", "layers.0.mlp.experts.gate_up_proj"): [("gate", 56), ("up", 56)],
}


@pytest.mark.parametrize(("case", "path"), SLICES)
def test_fused_slices(case, path):
    site = model_table(build(case), fused=True).sites[f"model.{path}"]
    assert [(s.name, s.width) for s in site.slices] == SLICES[case, path]


def test_kimi_k2_is_deepseek_v3():
    config = build("deepseek_v3").config
    renamed = SimpleNamespace(**{**config.to_dict(), "model_type": "kimi_k2"})
    assert model_table(renamed, fused=True).sites == model_table(config, fused=True).sites


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 40}
SMALL_VISION = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
WRAPPERS = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", {**PLAIN, **DELTA_NET}, VISION),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", QWEN_MOE, VISION),
    "gemma3": ("Gemma3ForConditionalGeneration", PLAIN, SMALL_VISION),
    "mistral3": ("Mistral3ForConditionalGeneration", {**PLAIN, "model_type": "mistral"}, None),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", DEEPSEEK, None),
}


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_multimodal_wrappers(model_type):
    name, text, vision = WRAPPERS[model_type]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    parts = {"text_config": dict(text)} | ({"vision_config": vision} if vision else {})
    config = transformers.AutoConfig.for_model(model_type, **parts)
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    # The vision tower and the projector are not the language model: no engine serves adapters there.
    real = {p for p in weights(model) if ".language_model." in p or p == "lm_head"}
    for source in (config, model):
        assert set(model_table(source, fused=False).sites) == real
    # The text-only class of the same model hangs its decoder elsewhere.
    with torch.device("meta"):
        text_model = transformers.AutoModelForCausalLM.from_config(config.text_config)
    check_unfused(text_model, model_table(text_model, fused=False))


def test_spellings_find_the_decoder():
    table = model_table(build("mixtral"), fused=False)
    old = "model.language_model.layers.0.block_sparse_moe.experts"
    assert "model.layers.0.mlp.experts" in table.spellings(old)
    nemotron = model_table(build("nemotron_h"), fused=False)
    assert "model.layers.0.mixer.in_proj" in nemotron.spellings("backbone.layers.0.mixer.in_proj")


def test_unknown_model_type_lists_the_known():
    with pytest.raises(UnknownModelError, match="got 'gpt2'") as error:
        model_table(SimpleNamespace(model_type="gpt2"), fused=True)
    assert all(name in str(error.value) for name in known_model_types())
    with pytest.raises(UnknownModelError, match="got None"):
        model_table(object(), fused=False)


def test_a_table_made_by_hand_knows_its_feeds():
    table = model_table(build("llama"), fused=True)
    bare = dataclasses.replace(table, feeds={})
    path = "model.layers.0.self_attn"
    assert bare.feeds[f"{path}.k_proj"] == ((f"{path}.qkv_proj", 1),)
    assert bare.feeds[f"{path}.qkv_proj"] == tuple((f"{path}.qkv_proj", i) for i in range(3))
