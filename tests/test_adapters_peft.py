"""Adapters that peft made and saved, against what peft itself merges into the weights: the delta must be the same."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polylora.adapters import AdapterError, load_adapter, read_peft
from polylora.models import model_table

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# Widths are odd and unequal, so a transposed or misplaced part cannot fit by accident.
BASE = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 51,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CONFIGS = {
    "llama": BASE,
    # Untied: merging into a tied weight would add up the adapters of both ends.
    "gemma2": BASE | {"tie_word_embeddings": False},
    "phi3": {k: v for k, v in BASE.items() if k != "head_dim"} | {"hidden_size": 48},
    "qwen3_5_moe_text": BASE
    | {
        "num_hidden_layers": 4,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "nemotron_h": {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": 51,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 36,
        "moe_latent_size": 20,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 10,
        "hybrid_override_pattern": "ME*-",
    },
    "deepseek_v3": {k: v for k, v in BASE.items() if k != "head_dim"}
    | {
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
    },
    "gpt_oss": BASE | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "llama4_text": BASE
    | {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 72, "moe_layers": [1]},
}
# Modules, by their tails, that peft will not adapt: Mamba's out_proj is refused, and where the experts were modules
# before transformers 5 peft takes these names for the experts' and targets their parameters instead.
UNADAPTABLE = {"nemotron_h": (".out_proj",), "deepseek_v3": (".gate_proj", ".up_proj", ".down_proj")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(model_type: str, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def modules_of(model) -> list[str]:
    """Every module that is a site and that peft can adapt."""
    refused = UNADAPTABLE.get(model.config.model_type, ())
    sites = model_table(model, fused=False).sites.values()
    return [s.path for s in sites if not s.experts and not s.path.endswith(refused)]


def parameters_of(model) -> list[str]:
    return [s.path for s in model_table(model, fused=False).sites.values() if s.experts]


def train(model, folder, *, seed=1, dtype=None, **config) -> dict[str, torch.Tensor]:
    """Adapt, fill A and B with random numbers, save; returns what peft's merge adds to each weight (float64)."""
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for n, p in adapted.named_parameters():
            if "lora_" in n:
                p.data = torch.randn(p.shape, generator=generator)
                if dtype is not None:
                    # Rounded to what is saved, so that the merge sees the same numbers.
                    p.data = p.data.to(dtype).float()
        adapted.to(torch.float64)
        for n, p in adapted.named_parameters():
            assert "lora_" in n or "base_layer" in n or p.dtype == torch.float64
        state = peft.get_peft_model_state_dict(adapted)
        state = {n: p.to(dtype or torch.float32) if "lora_" in n else p.to(torch.float32) for n, p in state.items()}
        adapted.save_pretrained(folder, state_dict=None)
        _rewrite(folder, state)
        merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters(remove_duplicate=False))
    return {n: after[n].detach().double() - before[n].double() for n in before if n in after}


def _rewrite(folder, state):
    from safetensors.torch import save_file

    save_file({n: p.contiguous().clone() for n, p in state.items()}, folder / "adapter_model.safetensors")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def delta_of(weights, site) -> torch.Tensor:
    """``scale * B @ A`` of a site: [experts or 1, width, k], rows as the site's output has them."""
    rows = []
    for entries in weights.entries:
        parts = []
        for piece, entry in zip(site.slices, entries, strict=True):
            if entry is None:
                parts.append(torch.zeros(piece.width, site.k, dtype=torch.float64))
                continue
            a = weights.a[entry.a]
            assert a.shape == (entry.rank, site.k) and entry.b.shape == (piece.width, entry.rank)
            assert a.is_contiguous() and entry.b.is_contiguous()
            parts.append(entry.scale / site.output_scale * (entry.b.double() @ a.double()))
        rows.append(torch.stack(parts, 1).flatten(0, 1) if site.interleaved else torch.cat(parts))
    return torch.stack(rows)


def check(bound, table, merged) -> int:
    """Compare every site with peft's merge; returns how many weights the adapter touched."""
    touched = {n for n, d in merged.items() if bool(d.abs().max() > 0)}
    seen = set()
    for site in table.sites.values():
        weights = bound.sites.get(site.path)
        delta = delta_of(weights, site) if weights else torch.zeros(site.experts or 1, site.width, site.k)
        if site.experts:
            name, ours = site.path, delta.transpose(1, 2) if site.transposed else delta
            pieces = {name: ours}
        else:
            at, pieces = 0, {}
            for source in site.sources:
                width = sum(s.width for s in site.slices if s.name in source.slices)
                one = delta[0, at : at + width]
                pieces[f"{source.path}.weight"] = one.T if site.kind == "embedding" else one
                at += width
        for name, ours in pieces.items():
            theirs = merged[name]
            assert ours.shape == theirs.shape, name
            assert bool(weights and theirs.abs().max() > 0) or name not in touched, name
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            seen.add(name)
    assert touched <= seen
    return len(touched)


def check_both(model, folder, merged) -> int:
    counts = {check(load_adapter(folder, t := model_table(model, fused=f)), t, merged) for f in (True, False)}
    assert len(counts) == 1
    return counts.pop()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_everything_adapted_at_once(model_type, tmp_path):
    model = build(model_type).double()
    targets, parameters = modules_of(model), parameters_of(model)
    merged = train(model, tmp_path, r=3, lora_alpha=5, target_modules=targets, target_parameters=parameters or None)
    model = build(model_type)
    assert check_both(model, tmp_path, merged) == len(targets) + len(parameters)


def test_modules_that_peft_takes_for_experts(tmp_path):
    """Listed by their old names, the experts' three projections become two parameters, gate_up with twice the rank."""
    model = build("deepseek_v3").double()
    merged = train(model, tmp_path, r=3, lora_alpha=5, target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"])
    adapter = read_peft(tmp_path)
    if not adapter.config.target_parameters:
        pytest.skip("this peft leaves the names alone")
    model = build("deepseek_v3")
    assert check_both(model, tmp_path, merged) == 2 + len(parameters_of(model))
    bound = load_adapter(tmp_path, model_table(model, fused=True))
    assert bound.max_rank == 6


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rslora(rslora, tmp_path):
    model = build("qwen3_5_moe_text").double()
    merged = train(
        model,
        tmp_path,
        r=4,
        lora_alpha=7,
        use_rslora=rslora,
        target_modules=modules_of(model),
        target_parameters=parameters_of(model),
        # A tail, a regular expression, one layer only, and expert parameters; where two match, the first counts.
        rank_pattern={
            "k_proj": 2,
            r"layers\.[01]\..*in_proj_(qkv|z)": 5,
            r"linear_attn\.in_proj_z": 6,
            "model.layers.2.mlp.experts.down_proj": 3,
            "experts.gate_up_proj": 2,
            "proj": 9,
        },
        alpha_pattern={"lm_head": 1.5, r"experts\.\w+_proj": 11, r"model\.layers\.3.*": 2},
    )
    check_both(build("qwen3_5_moe_text"), tmp_path, merged)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "nemotron_h", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_parameter_alone(model_type, which, tmp_path):
    model = build(model_type).double()
    parameters = parameters_of(model)[which::2]
    merged = train(model, tmp_path, r=2, target_modules=[], target_parameters=parameters)
    model = build(model_type)
    assert check_both(model, tmp_path, merged) == len(parameters)
    if model_type == "nemotron_h":
        # Without the list, up (newer peft) and down (older) look alike.
        edit_config(tmp_path, target_parameters=None, peft_version=None)
        with pytest.raises(AdapterError, match=r"experts\.lora_A\.weight' is ambiguous: expected .*target_parameters"):
            load_adapter(tmp_path, model_table(model, fused=True))
    else:
        edit_config(tmp_path, target_parameters=None)
        check_both(model, tmp_path, merged)


@pytest.mark.parametrize("version", ["0.21.2", "0.19.0"])
def test_square_parameters_are_decided_by_the_version(version, tmp_path):
    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19):
        pytest.skip("this peft lays A along the other axis")
    changes = {"moe_intermediate_size": 40, "moe_latent_size": 40}
    merged = train(
        build("nemotron_h", **changes).double(),
        tmp_path,
        r=2,
        target_modules=[],
        target_parameters=["experts.up_proj", "experts.down_proj"],
    )
    model = build("nemotron_h", **changes)
    edit_config(tmp_path, peft_version=version)
    check_both(model, tmp_path, merged)
    edit_config(tmp_path, peft_version=None)
    with pytest.raises(AdapterError, match="is ambiguous") as error:
        load_adapter(tmp_path, model_table(model, fused=True))
    assert len(error.value.problems) == 2


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_5_moe_text", "gpt_oss", "llama4_text"])
def test_expert_parameters_of_older_peft(model_type, square, tmp_path):
    """Before 0.19: delta = einsum("o r e, e r i -> e i o"), i the first axis of a parameter whatever it means."""
    changes = {"nemotron_h": {"moe_intermediate_size": 40, "moe_latent_size": 40}}.get(model_type, {}) if square else {}
    model = build(model_type, **changes)
    config = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    train(build(model_type, **changes), tmp_path, **config)
    generator = torch.Generator().manual_seed(3)
    state, merged = {}, {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    for path in parameters_of(model):
        if path.endswith("down_proj"):
            param = model.get_parameter(path)
            experts, i, o = param.shape
            a, b = torch.randn(experts * 2, i, generator=generator), torch.randn(o, 2 * experts, generator=generator)
            key = "base_model.model." + path.removesuffix(".down_proj")
            state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = a, b
            a, b = a.double().reshape(experts, -1, i), b.double().reshape(o, -1, experts)
            merged[path] = torch.einsum("ore,eri->eio", b, a) * 4
    _rewrite(tmp_path, state)
    edit_config(tmp_path, peft_version="0.18.1")
    check_both(model, tmp_path, merged)


def test_one_a_for_all_slices(tmp_path):
    """A of a fused module is stored once; of HF's in_proj_qkv once for q, k and v, and another for z."""
    model = build("qwen3_5_moe_text")
    train(model, tmp_path, r=2, target_modules=modules_of(model), target_parameters=parameters_of(model))
    table = model_table(build("qwen3_5_moe_text"), fused=True)
    bound = load_adapter(tmp_path, table)
    qkvz = bound.sites["model.layers.0.linear_attn.in_proj_qkvz"]
    assert [e.a for e in qkvz.entries[0]] == [0, 0, 0, 1] and len(qkvz.a) == 2
    ba = bound.sites["model.layers.0.linear_attn.in_proj_ba"]
    assert [e.a for e in ba.entries[0]] == [0, 1]
    experts = bound.sites["model.layers.0.mlp.experts.gate_up_proj"]
    assert [[e.a for e in row] for row in experts.entries] == [[0, 0], [1, 1], [2, 2]] and len(experts.a) == 3
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    model = build("phi3")
    train(model, tmp_path, r=2, target_modules=["qkv_proj", "gate_up_proj"])
    bound = load_adapter(tmp_path, model_table(build("phi3"), fused=True))
    assert [len(site.a) for site in bound.sites.values()] == [1, 1, 1, 1]
    assert bound.max_rank == 2


def test_embedding_factor_of_gemma(tmp_path):
    """Hugging Face's Gemma embedding scales its output, adapter included; the unfused table follows it."""
    model = build("gemma2")
    if not hasattr(model.get_input_embeddings(), "embed_scale"):
        pytest.skip("this transformers scales outside of the module")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens"]))
        for n, p in adapted.named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p)
        adapted.save_pretrained(tmp_path)
        ids = torch.arange(9)
        module = adapted.get_base_model().model.embed_tokens
        with torch.no_grad():
            delta = module(ids) - module.base_layer(ids)
    for fused, factor in ((False, 1.0), (True, 40**0.5)):
        site = load_adapter(tmp_path, model_table(build("gemma2"), fused=fused)).sites["model.embed_tokens"]
        entry = site.entries[0][0]
        ours = entry.scale * factor * (site.a[0][:, :9].T @ entry.b.T)
        torch.testing.assert_close(ours, delta, rtol=1e-4, atol=1e-4)


NAMES = st.lists(st.sampled_from(["model", "layers", "0", "1", "q_proj", "q", "proj", "mlp"]), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    path=NAMES.map(".".join),
    targets=st.lists(NAMES.map(".".join), max_size=3)
    | st.sampled_from([r".*\.(q|k)_proj", r"q_proj", r"model\.layers\.[01]\..*", ".*mlp", r"(?!.*mlp).*proj", ""]),
    parameters=st.none() | st.just(["experts.down_proj"]),
)
def test_target_modules_by_pefts_own_rule(path, targets, parameters):
    from peft.tuners.tuners_utils import check_target_module_exists
    from polylora.adapters.config import parse_config

    raw = {"peft_type": "LORA", "target_modules": targets, "target_parameters": parameters}
    config, problems = parse_config(raw)
    assert not problems
    theirs = check_target_module_exists(peft.LoraConfig(target_modules=targets, target_parameters=parameters), path)
    assert config.targets(path) == bool(theirs)
    if parameters:
        config, _ = parse_config({**raw, "target_modules": None})
        none = peft.LoraConfig(target_modules=None, target_parameters=parameters)
        assert config.targets(path) == bool(check_target_module_exists(none, path))


def test_weights_that_peft_ignores_are_refused(tmp_path):
    """Saved with seven linears, the config says one: peft loads q_proj and drops the others without an error."""
    model = build("llama")
    train(model, tmp_path, r=2, target_modules="all-linear")
    edit_config(tmp_path, target_modules=["q_proj"])
    with pytest.raises(AdapterError) as error:
        load_adapter(tmp_path, model_table(build("llama"), fused=True))
    assert len(error.value.problems) == 6 * 2 and "(not in target_modules)" in str(error.value)


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(saved, tmp_path):
    merged = train(build("llama").double(), tmp_path, r=3, target_modules="all-linear", dtype=saved)
    model = build("llama")
    bound = load_adapter(tmp_path, model_table(model, fused=True))
    assert {a.dtype for site in bound.sites.values() for a in site.a} == {saved}
    check_both(model, tmp_path, merged)


def test_names_of_other_wrappers(tmp_path):
    """The same decoder under a multimodal class's prefix, as raw state dicts name it, and without peft's prefix."""
    merged = train(
        build("llama").double(),
        tmp_path,
        r=3,
        target_modules=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"model.layers.1.self_attn.q_proj": 2},
    )
    model = build("llama")
    state = {f"base_model.model.{k}": v for k, v in read_peft(tmp_path).tensors.items()}
    for old, new in (
        ("base_model.model.", ""),
        (".lora_A.weight", ".lora_A.default.weight"),
        ("base_model.model.model.", "base_model.model.language_model.model."),
    ):
        if "language_model" in new:
            # Patterns are matched against the adapter's own spelling.
            edit_config(tmp_path, rank_pattern={"language_model.model.layers.1.self_attn.q_proj": 2})
        _rewrite(tmp_path, {k.replace(old, new): v for k, v in state.items()})
        check_both(model, tmp_path, merged)


MODEL_TABLES = {}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_subset_binds_to_what_was_saved(data, tmp_path_factory):
    model_type = data.draw(st.sampled_from(["qwen3_5_moe_text", "deepseek_v3"]))
    model = build(model_type).double()
    modules, parameters = modules_of(model), parameters_of(model)
    targets = data.draw(st.lists(st.sampled_from(modules), unique=True, max_size=9))
    params = data.draw(st.lists(st.sampled_from(parameters), unique=True, max_size=4))
    if not targets and not params:
        return
    ranks = data.draw(st.dictionaries(st.sampled_from(modules + parameters), st.integers(1, 9), max_size=5))
    alphas = data.draw(st.dictionaries(st.sampled_from(modules + parameters), st.integers(1, 30), max_size=5))
    folder = tmp_path_factory.mktemp("adapter")
    merged = train(
        model,
        folder,
        seed=data.draw(st.integers(0, 99)),
        r=data.draw(st.integers(1, 12)),
        lora_alpha=data.draw(st.integers(1, 20)),
        use_rslora=data.draw(st.booleans()),
        rank_pattern={k.replace(".", r"\."): v for k, v in ranks.items()},
        alpha_pattern={k.replace(".", r"\."): v for k, v in alphas.items()},
        target_modules=targets,
        target_parameters=params or None,
    )
    assert check_both(build(model_type), folder, merged) == len(targets) + len(params)
    shutil.rmtree(folder)
