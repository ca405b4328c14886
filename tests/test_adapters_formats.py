"""Formats that peft does not write itself: experts one by one, stacked, shared; fused modules; partial adapters."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from polylora.adapters import AdapterError, bind, load_adapter, read_peft
from polylora.models import model_table
from safetensors.torch import save_file

QWEN = SimpleNamespace(
    model_type="qwen3_5_moe_text",
    hidden_size=20,
    vocab_size=31,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    linear_key_head_dim=4,
    linear_value_head_dim=3,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=3,
    moe_intermediate_size=14,
    shared_expert_intermediate_size=10,
)
NEMOTRON = SimpleNamespace(
    model_type="nemotron_h",
    hidden_size=20,
    vocab_size=31,
    intermediate_size=28,
    layers_block_type=["mamba", "moe"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    mamba_num_heads=4,
    mamba_head_dim=3,
    n_groups=2,
    ssm_state_size=5,
    n_routed_experts=3,
    moe_intermediate_size=14,
    moe_shared_expert_intermediate_size=26,
    moe_latent_size=12,
)
MIXTRAL = SimpleNamespace(
    model_type="mixtral",
    hidden_size=20,
    vocab_size=31,
    intermediate_size=14,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=3,
)
GPT_OSS = SimpleNamespace(**{**vars(MIXTRAL), "model_type": "gpt_oss"})

RANK, SCALE = 2, 3.0
EXPERTS = "model.layers.0.mlp.experts"


def rand(*shape) -> torch.Tensor:
    return torch.randn(shape)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(path: str, k: int, width: int, rank: int = RANK) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A.weight": rand(rank, k), f"{path}.lora_B.weight": rand(width, rank)}


def write(folder, tensors, prefix="base_model.model.", **config):
    folder.mkdir(exist_ok=True)
    save_file(
        {prefix + key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(weights, expert: int, index: int) -> torch.Tensor:
    entry = weights.entries[expert][index]
    return entry.scale * (entry.b @ weights.a[entry.a])


def expected(tensors, path: str) -> torch.Tensor:
    return SCALE * (tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"])


@pytest.mark.parametrize(
    ("config", "names", "block"),
    [
        (QWEN, ("gate_proj", "up_proj", "down_proj"), EXPERTS),
        (QWEN, ("w1", "w3", "w2"), EXPERTS),
        (MIXTRAL, ("w1", "w3", "w2"), "model.layers.0.block_sparse_moe.experts"),
        (GPT_OSS, ("gate_proj", "up_proj", "down_proj"), EXPERTS),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_experts_one_by_one(config, names, block, fused, tmp_path):
    gate, up, down = names
    tensors = {}
    # Expert 1 has no gate, expert 2 no down: what is absent stays absent.
    for expert, leaf in ((0, gate), (0, up), (0, down), (1, up), (1, down), (2, gate), (2, up)):
        tensors |= pair(f"{block}.{expert}.{leaf}", *((14, 20) if leaf == down else (20, 14)))
    bound = load_adapter(write(tmp_path / "a", tensors), model_table(config, fused=fused))
    assert set(bound.sites) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for expert in range(3):
        for kind, index, leaf in (("gate_up", 0, gate), ("gate_up", 1, up), ("down", 0, down)):
            weights, path = bound.sites[f"{EXPERTS}.{kind}_proj"], f"{block}.{expert}.{leaf}"
            if f"{path}.lora_A.weight" in tensors:
                torch.testing.assert_close(product(weights, expert, index), expected(tensors, path))
            else:
                assert weights.entries[expert][index] is None


@pytest.mark.parametrize("names", [("up_proj", "down_proj"), ("w1", "w2")])
def test_non_gated_experts_one_by_one(names, tmp_path):
    experts = "model.layers.1.mixer.experts"
    tensors = {}
    for expert in range(3):
        tensors |= pair(f"{experts}.{expert}.{names[0]}", 12, 14) | pair(f"{experts}.{expert}.{names[1]}", 14, 12)
    bound = load_adapter(write(tmp_path / "a", tensors), model_table(NEMOTRON, fused=True))
    for expert in range(3):
        for leaf, name in (("up", names[0]), ("down", names[1])):
            weights = bound.sites[f"{experts}.{leaf}_proj"]
            torch.testing.assert_close(product(weights, expert, 0), expected(tensors, f"{experts}.{expert}.{name}"))
    tensors |= pair(f"{experts}.0.gate_proj", 12, 14) | pair(f"{experts}.3.up_proj", 12, 14)
    with pytest.raises(AdapterError) as error:
        load_adapter(write(tmp_path / "b", tensors), model_table(NEMOTRON, fused=True))
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert all(
        f"{experts}.{name}.lora_{half}.weight' matches no site" in text
        for name in ("0.gate_proj", "3.up_proj")
        for half in "AB"
    )


@pytest.mark.parametrize("suffix", [".weight", ""])
def test_shared_outer_experts(suffix, tmp_path):
    """One A of gate and up for all experts, one B of down for all experts."""
    tensors = {
        f"{EXPERTS}.w1.lora_A{suffix}": rand(1, RANK, 20),
        f"{EXPERTS}.w1.lora_B{suffix}": rand(3, 14, RANK),
        f"{EXPERTS}.w3.lora_A{suffix}": rand(1, RANK, 20),
        f"{EXPERTS}.w3.lora_B{suffix}": rand(3, 14, RANK),
        f"{EXPERTS}.w2.lora_A{suffix}": rand(3, RANK, 14),
        f"{EXPERTS}.w2.lora_B{suffix}": rand(1, 20, RANK),
    }
    bound = load_adapter(write(tmp_path / "a", tensors), model_table(QWEN, fused=True))
    up, down = bound.sites[f"{EXPERTS}.gate_up_proj"], bound.sites[f"{EXPERTS}.down_proj"]
    assert [[e.a for e in row] for row in up.entries] == [[0, 1]] * 3 and len(up.a) == 2
    assert [row[0].a for row in down.entries] == [0, 1, 2]
    assert len({row[0].b.data_ptr() for row in down.entries}) == 1
    for e in range(3):
        for weights, index, name in ((up, 0, "w1"), (up, 1, "w3"), (down, 0, "w2")):
            a, b = tensors[f"{EXPERTS}.{name}.lora_A{suffix}"], tensors[f"{EXPERTS}.{name}.lora_B{suffix}"]
            a, b = a[min(e, len(a) - 1)], b[min(e, len(b) - 1)]
            torch.testing.assert_close(product(weights, e, index), SCALE * (b @ a))


def test_stacked_gate_up(tmp_path):
    a, b = rand(3, RANK, 20), rand(3, 28, RANK)
    tensors = {f"{EXPERTS}.gate_up_proj.lora_A.weight": a, f"{EXPERTS}.gate_up_proj.lora_B.weight": b}
    for config, rows in ((QWEN, (slice(0, 14), slice(14, 28))), (GPT_OSS, (slice(0, 28, 2), slice(1, 28, 2)))):
        bound = load_adapter(write(tmp_path / "a", tensors), model_table(config, fused=True))
        weights = bound.sites[f"{EXPERTS}.gate_up_proj"]
        assert [[e.a for e in row] for row in weights.entries] == [[0, 0], [1, 1], [2, 2]]
        for e in range(3):
            for index in (0, 1):
                torch.testing.assert_close(product(weights, e, index), SCALE * (b[e][rows[index]] @ a[e]))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("path", "widths", "modules"),
    [
        ("model.layers.1.self_attn.qkv_proj", (48, 12, 12), ("q_proj", "k_proj", "v_proj")),
        ("model.layers.1.self_attn.W_pack", (48, 12, 12), ("q_proj", "k_proj", "v_proj")),
        ("model.layers.1.mlp.shared_expert.gate_up_proj", (10, 10), ("gate_proj", "up_proj")),
        ("model.layers.0.linear_attn.in_proj_qkvz", (8, 8, 12, 12), ("in_proj_qkv", "in_proj_z")),
        ("model.layers.0.linear_attn.in_proj_ba", (4, 4), ("in_proj_b", "in_proj_a")),
    ],
)
def test_trained_on_the_fused_module(path, widths, modules, fused, tmp_path):
    tensors = pair(path, 20, sum(widths))
    table = model_table(QWEN, fused=fused)
    bound = load_adapter(write(tmp_path / "a", tensors), table)
    parent = path.rpartition(".")[0]
    if fused:
        (site,) = bound.sites.values()
        assert len(site.a) == 1 and [e.a for e in site.entries[0]] == [0] * len(widths)
        rows = [product(site, 0, i) for i in range(len(widths))]
        assert tuple(len(r) for r in rows) == widths
    else:
        assert list(bound.sites) == [f"{parent}.{m}" for m in modules]
        rows = [product(site, 0, 0) for site in bound.sites.values()]
    torch.testing.assert_close(torch.cat(rows), expected(tensors, path))


def test_repeated_a_is_stored_once(tmp_path):
    """Exports of a fused adapter under the unfused names repeat its A; shrink must not compute it three times."""
    a = rand(RANK, 20)
    tensors = {}
    for name, width in (("q", 48), ("k", 12), ("v", 12)):
        path = f"model.layers.1.self_attn.{name}_proj"
        tensors |= {f"{path}.lora_A.weight": a.clone(), f"{path}.lora_B.weight": rand(width, RANK)}
    # Equal at both ends only: not the same matrix.
    other = a.clone()
    other[0, 10] += 1
    for e in range(3):
        tensors |= pair(f"{EXPERTS}.{e}.up_proj", 20, 14)
        tensors[f"{EXPERTS}.{e}.up_proj.lora_A.weight"] = other.clone() if e == 2 else a.clone()
    bound = load_adapter(write(tmp_path / "a", tensors), model_table(QWEN, fused=True))
    qkv = bound.sites["model.layers.1.self_attn.qkv_proj"]
    assert len(qkv.a) == 1 and [e.a for e in qkv.entries[0]] == [0, 0, 0]
    experts = bound.sites[f"{EXPERTS}.gate_up_proj"]
    assert len(experts.a) == 2 and [row[1].a for row in experts.entries] == [0, 0, 1]


@pytest.mark.parametrize(
    ("module", "site", "place", "widths"),
    [
        ("layers.1.self_attn.k_proj", "layers.1.self_attn.qkv_proj", (0, 1), (48, 12, 12)),
        ("layers.0.mlp.shared_expert.gate_proj", "layers.0.mlp.shared_expert.gate_up_proj", (0, 0), (10, 10)),
        ("layers.0.mlp.shared_expert.up_proj", "layers.0.mlp.shared_expert.gate_up_proj", (0, 1), (10, 10)),
        ("layers.0.linear_attn.in_proj_a", "layers.0.linear_attn.in_proj_ba", (0, 1), (4, 4)),
        ("layers.0.linear_attn.in_proj_z", "layers.0.linear_attn.in_proj_qkvz", (0, 3), (8, 8, 12, 12)),
        ("layers.0.mlp.shared_expert_gate", "layers.0.mlp.shared_expert_gate", (0, 0), (1,)),
    ],
)
def test_one_part_of_a_fused_module(module, site, place, widths, tmp_path):
    tensors = pair(f"model.{module}", 20, widths[place[1]])
    bound = load_adapter(write(tmp_path / "a", tensors), model_table(QWEN, fused=True))
    assert list(bound.sites) == [f"model.{site}"]
    weights = bound.sites[f"model.{site}"]
    assert [e is not None for e in weights.entries[0]] == [i == place[1] for i in range(len(widths))]
    torch.testing.assert_close(product(weights, *place), expected(tensors, f"model.{module}"))


def test_nemotron_mamba_and_old_names(tmp_path):
    """Modules that peft refuses to adapt, under the names the model was first published with."""
    mixer = "layers.0.mixer"
    tensors = pair(f"backbone.{mixer}.in_proj", 20, 12 + 12 + 10 + 10 + 4) | pair(f"backbone.{mixer}.out_proj", 12, 20)
    tensors |= {
        "backbone.embeddings.lora_embedding_A": rand(RANK, 31),
        "backbone.embeddings.lora_embedding_B": rand(20, RANK),
    }
    bound = load_adapter(write(tmp_path / "a", tensors), model_table(NEMOTRON, fused=True))
    site = bound.sites[f"model.{mixer}.in_proj"]
    assert [e.b.shape[0] for e in site.entries[0]] == [12, 12, 10, 10, 4] and len(site.a) == 1
    whole = torch.cat([product(site, 0, i) for i in range(5)])
    torch.testing.assert_close(whole, expected(tensors, f"backbone.{mixer}.in_proj"))
    torch.testing.assert_close(
        product(bound.sites["model.embeddings"], 0, 0),
        SCALE * tensors["backbone.embeddings.lora_embedding_B"] @ tensors["backbone.embeddings.lora_embedding_A"],
    )


def test_whole_base_matrices_beside_adapted_embeddings(tmp_path):
    tensors = {
        "model.embed_tokens.lora_embedding_A": rand(RANK, 31),
        "model.embed_tokens.lora_embedding_B": rand(20, RANK),
        # Not read at all: neither their type nor NaN in them matters.
        "model.embed_tokens.base_layer.weight": torch.full((31, 20), float("nan")),
        "lm_head.base_layer.weight": torch.zeros(31, 20, dtype=torch.int8),
        **pair("lm_head", 20, 31),
    }
    folder = write(tmp_path / "a", tensors)
    adapter = read_peft(folder, name="mine")
    assert set(adapter.base_weights) == {"model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight"}
    bound = bind(adapter, model_table(QWEN, fused=True))
    assert (bound.name, set(bound.sites)) == ("mine", {"model.embed_tokens", "lm_head"})


def test_fan_in_fan_out_changes_nothing_for_linears(tmp_path):
    path = "model.layers.1.self_attn.q_proj"
    tensors = pair(path, 20, 48)
    bound = load_adapter(write(tmp_path / "a", tensors, fan_in_fan_out=True), model_table(QWEN, fused=False))
    torch.testing.assert_close(product(bound.sites[path], 0, 0), expected(tensors, path))


def test_tensors_do_not_depend_on_the_file(tmp_path):
    path = "model.layers.1.self_attn.q_proj"
    folder = write(tmp_path / "a", tensors := pair(path, 20, 48))
    bound = load_adapter(folder, model_table(QWEN, fused=False))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    torch.testing.assert_close(product(bound.sites[path], 0, 0), expected(tensors, path))


def test_links_inside_the_folder_and_the_hub_cache(tmp_path):
    table, tensors = model_table(QWEN, fused=False), pair("lm_head", 20, 31)
    home = tmp_path / "models--someone--adapter"
    folder = home / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (home / "blobs").mkdir()
    write(folder, tensors)
    for blob, name in (("11", "adapter_config.json"), ("22", "adapter_model.safetensors")):
        (folder / name).rename(home / "blobs" / blob)
        (folder / name).symlink_to(f"../../blobs/{blob}")
    assert set(load_adapter(folder, table).sites) == {"lm_head"}
    plain = write(tmp_path / "plain", tensors)
    (plain / "adapter_model.safetensors").rename(plain / "other")
    (plain / "adapter_model.safetensors").symlink_to("other")
    link = tmp_path / "link"
    link.symlink_to(plain)
    assert load_adapter(link, table).name == "link"
