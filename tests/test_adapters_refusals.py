"""What cannot be served exactly is refused at load time, whole, with every offending tensor or key named."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polylora.adapters import AdapterError, load_adapter, read_peft
from polylora.models import model_table
from safetensors.torch import save_file

LLAMA = SimpleNamespace(
    model_type="llama",
    hidden_size=20,
    vocab_size=31,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
TABLE = model_table(LLAMA, fused=True)
MIXTRAL = SimpleNamespace(**{**vars(LLAMA), "model_type": "mixtral", "num_local_experts": 3})
Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"
PREFIX = "base_model.model."


def pair(path: str, k: int = 20, width: int = 24, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A.weight": torch.randn(rank, k), f"{path}.lora_B.weight": torch.randn(width, rank)}


def write(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    tensors = pair(Q) if tensors is None else tensors
    save_file(
        {PREFIX + key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused(folder, table=TABLE) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        load_adapter(folder, table)
    lines = str(error.value).splitlines()
    assert len(lines) == len(error.value.problems)
    for line in lines:
        assert line.startswith(f"polylora: adapter {folder.name!r}: ")
        assert ": expected " in line and ", got " in line
    return error.value


def test_the_plain_one_is_fine(tmp_path):
    assert list(load_adapter(write(tmp_path / "a"), TABLE).sites) == ["model.layers.0.self_attn.qkv_proj"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("alora_invocation_tokens", [5]),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", {"a": 1}),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"a": 1}),
        ("some_new_trick", True),
        ("r", 0),
        ("r", 300),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("use_rslora", 1),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_parameters", "experts.down_proj"),
        ("layers_to_transform", "all"),
        ("exclude_modules", 3),
        ("target_modules", 3),
        ("target_modules", {"q_proj": True}),
        ("target_modules", ["q_proj", 1]),
        ("target_modules", "("),
    ],
)
def test_config_keys(key, value, tmp_path):
    error = refused(write(tmp_path / "a", **{key: value}))
    assert f"config key {key!r}" in str(error)


@pytest.mark.parametrize(
    "pattern", [r"(\w*)\1", "(((a*)*)*)*b", "((a?){900}){900}", "(?i)q_proj", "(" * 300 + "a" + ")" * 300, "a" * 5000]
)
def test_patterns_that_are_not_simple(pattern, tmp_path):
    error = refused(write(tmp_path / "a", rank_pattern={pattern: 2}, exclude_modules=pattern, target_modules=pattern))
    for key in ("rank_pattern", "exclude_modules", "target_modules"):
        assert f"config key {key!r}: expected " in str(error)


def test_patterns_that_re_would_match_for_years(tmp_path):
    for n, pattern in enumerate([".?" * 40 + "Z", ".{0,900}" * 20 + "Z", "(.+)+Z", "(o|o)" * 40 + "Z"]):
        load_adapter(write(tmp_path / str(n), rank_pattern={pattern: 9}, exclude_modules=pattern), TABLE)


@pytest.mark.parametrize(
    "pattern", [r".*\.layers\.[0-9]+\..*q_proj", r"(self_attn\.)?(q|k)_proj", r"q_proj|layers\.\d{1,2}\..*"]
)
def test_patterns_as_people_write_them(pattern, tmp_path):
    load_adapter(write(tmp_path / "a", r=9, rank_pattern={pattern: 2}, exclude_modules=r".*(visual|vision)\..*"), TABLE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", False),
        ("modules_to_save", []),
        ("some_new_trick", None),
        ("lora_dropout", 0.3),
        ("target_modules", "all-linear"),
        ("loftq_config", {}),
        ("eva_config", {"rho": 2.0}),
        ("fan_in_fan_out", True),
        ("peft_version", "0.99.0.dev0@abc"),
    ],
)
def test_config_keys_that_do_not_matter(key, value, tmp_path):
    load_adapter(write(tmp_path / "a", **{key: value}), TABLE)


def test_rank_pattern_and_default_alpha(tmp_path):
    weights = load_adapter(write(tmp_path / "a", r=8, rank_pattern={r"self_attn\.q_proj": 2}), TABLE)
    assert weights.sites["model.layers.0.self_attn.qkv_proj"].entries[0][0].scale == 4 / 2
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    weights = load_adapter(tmp_path / "a", TABLE)
    assert weights.sites["model.layers.0.self_attn.qkv_proj"].entries[0][0].scale == 8 / 2


NAN = torch.tensor([[1.0, float("nan"), float("inf")] + [0.0] * 17] * 2)
TENSORS = {
    "matches no site": (pair("model.layers.9.self_attn.q_proj"), ["model.layers.9.self_attn.q_proj.lora_A.weight"]),
    "is no LoRA weight: expected lora_A or lora_B, got a bias": (
        {"model.layers.0.mlp.up_proj.bias": torch.ones(14)},
        ["model.layers.0.mlp.up_proj.bias"],
    ),
    "got a DoRA magnitude": ({f"{Q}.lora_magnitude_vector": torch.ones(24)}, [f"{Q}.lora_magnitude_vector"]),
    "got a whole copy": ({"lm_head.modules_to_save.weight": torch.ones(31, 20)}, ["lm_head.modules_to_save.weight"]),
    "got retrained embedding rows": (
        {"model.embed_tokens.trainable_tokens_delta": torch.ones(2, 20)},
        ["model.embed_tokens.trainable_tokens_delta"],
    ),
    "got a whole base weight": (
        {f"{Q}.base_layer.weight": torch.ones(24, 20), "lm_head.weight": torch.ones(31, 20)},
        [f"{Q}.base_layer.weight", "lm_head.weight"],
    ),
    "replaces a base weight": ({"lm_head.base_layer.weight": torch.ones(31, 20)}, ["lm_head.base_layer.weight"]),
    "is alone: expected lora_A beside it": ({"lm_head.lora_B.weight": torch.ones(31, 2)}, ["lm_head.lora_B.weight"]),
    "is alone: expected lora_B beside it": ({"lm_head.lora_A.weight": torch.ones(2, 20)}, ["lm_head.lora_A.weight"]),
    "has the wrong rank: expected 2 (config), got 3": (pair("lm_head", 20, 31, 3), ["lm_head.lora_A.weight"]),
    "has too high a rank: expected at most 256, got 300": (pair("lm_head", 20, 31, 300), ["lm_head.lora_A.weight"]),
    "has the wrong shape: expected [31, 2], got [30, 2]": (pair("lm_head", 20, 30), ["lm_head.lora_B.weight"]),
    "has the wrong shape: expected [2, 20], got [2, 21]": (pair("lm_head", 21, 31), ["lm_head.lora_A.weight"]),
    "has the wrong shape: expected two dimensions, got [2] (A)": (
        {"lm_head.lora_A.weight": torch.ones(2), "lm_head.lora_B.weight": torch.ones(31, 2)},
        ["lm_head.lora_A.weight"],
    ),
    "is not finite: expected numbers, got 4 NaN or Inf": (
        {"lm_head.lora_A.weight": NAN, "lm_head.lora_B.weight": torch.ones(31, 2)},
        ["lm_head.lora_A.weight"],
    ),
    "has the wrong dtype: expected one of F32, F16, BF16, got F64": (
        {k: v.double() for k, v in pair("lm_head", 20, 31).items()},
        ["lm_head.lora_A.weight", "lm_head.lora_B.weight"],
    ),
    "got I8": (
        {k: v.to(torch.int8) for k, v in pair("lm_head", 20, 31).items()},
        ["lm_head.lora_A.weight", "lm_head.lora_B.weight"],
    ),
    "is empty": (
        {"lm_head.lora_A.weight": torch.ones(0, 20), "lm_head.lora_B.weight": torch.ones(31, 0)},
        ["lm_head.lora_A.weight", "lm_head.lora_B.weight"],
    ),
    "has a strange name": (pair("../model"), ["../model.lora_A.weight"]),
    "meets another tensor": (
        pair("model.layers.0.self_attn.qkv_proj", 20, 48),
        ["model.layers.0.self_attn.qkv_proj.lora_B.weight"],
    ),
}


@pytest.mark.parametrize("problem", TENSORS)
def test_tensors(problem, tmp_path):
    tensors, named = TENSORS[problem]
    error = refused(write(tmp_path / "a", pair(Q) | tensors))
    assert problem in str(error)
    for key in named:
        assert any(f"{PREFIX}{key}'" in line for line in error.problems)


def test_embedding_tensors(tmp_path):
    emb = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 31),
        "model.embed_tokens.lora_embedding_B": torch.ones(20, 2),
    }
    resized = {"model.embed_tokens.base_layer.weight": torch.ones(33, 20)}
    error = refused(write(tmp_path / "a", emb | resized))
    assert "embed_tokens.base_layer.weight' has the wrong shape: expected [31, 20] (the base), got [33, 20]" in str(
        error
    )
    emb["model.embed_tokens.lora_embedding_A"] = torch.ones(2, 33)
    error = refused(write(tmp_path / "a", emb))
    assert "embed_tokens.lora_embedding_A' has the wrong shape: expected [2, 31], got [2, 33]" in str(error)
    wrong = {f"{Q}.lora_embedding_A": torch.ones(2, 20), f"{Q}.lora_embedding_B": torch.ones(24, 2)}
    assert "q_proj.lora_embedding_A' matches no site" in str(refused(write(tmp_path / "a", wrong)))
    # A linear pair cannot stand in for an embedding's.
    error = refused(write(tmp_path / "a", pair("model.embed_tokens", 31, 20)))
    assert "embed_tokens.lora_A.weight' matches no site" in str(error)


def test_ensure_weight_tying_needs_both_ends(tmp_path):
    emb = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 31),
        "model.embed_tokens.lora_embedding_B": torch.ones(20, 2),
    }
    error = refused(write(tmp_path / "a", emb, ensure_weight_tying=True))
    assert "expected weights of model.embed_tokens and lm_head, got model.embed_tokens only" in str(error)
    load_adapter(write(tmp_path / "a", emb | pair("lm_head", 20, 31), ensure_weight_tying=True), TABLE)
    load_adapter(write(tmp_path / "a", ensure_weight_tying=True), TABLE)


def test_weights_the_config_rules_out(tmp_path):
    assert "layers_to_transform names layers [1]" in str(refused(write(tmp_path / "a", layers_to_transform=1)))
    load_adapter(write(tmp_path / "a", layers_to_transform=[0]), TABLE)
    assert "exclude_modules names 'q_proj'" in str(refused(write(tmp_path / "a", exclude_modules=["q_proj"])))
    assert "exclude_modules matches it" in str(refused(write(tmp_path / "a", exclude_modules=r".*q_proj")))
    load_adapter(write(tmp_path / "a", exclude_modules=["proj"]), TABLE)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["k_proj", "self_attn.q_proj"],
        [Q],
        [Q.replace("model.", "model.language_model.")],
        ".*q_proj",
        r"model\.layers\.\d+\.self_attn\.(q|k)_proj",
        "all-linear",
        "All-Linear",
        None,
    ],
)
def test_target_modules_that_name_the_module(targets, tmp_path):
    prefixed = targets == [Q.replace("model.", "model.language_model.")]
    tensors = pair(targets[0] if prefixed else Q)
    assert load_adapter(write(tmp_path / "a", tensors, target_modules=targets), TABLE).sites


@pytest.mark.parametrize(
    "targets",
    [["k_proj"], ["proj"], ["q_pro"], ["layers.1.self_attn.q_proj"], [], ".*k_proj", "q_proj", "self_attn.q_proj", ""],
)
def test_tensors_that_target_modules_leaves_out(targets, tmp_path):
    """peft would make no adapter there and ignore the tensors."""
    error = refused(write(tmp_path / "a", target_modules=targets))
    assert f"{PREFIX}{Q}.lora_A.weight' contradicts the config: expected no weights (not in target_modules)" in str(
        error
    )
    assert len(error.problems) == 1


def test_target_modules_and_both_ends(tmp_path):
    emb = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 31),
        "model.embed_tokens.lora_embedding_B": torch.ones(20, 2),
    }
    head = pair("lm_head", 20, 31)
    load_adapter(write(tmp_path / "a", emb | head, target_modules=["embed_tokens", "lm_head"]), TABLE)
    error = refused(write(tmp_path / "a", emb | head, target_modules=["lm_head"]))
    assert len(error.problems) == 1 and "embed_tokens.lora_embedding_A' contradicts the config" in str(error)
    # An embedding is no linear.
    error = refused(write(tmp_path / "a", emb | head, target_modules="all-linear"))
    assert len(error.problems) == 1 and "embed_tokens.lora_embedding_A' contradicts the config" in str(error)
    # Tied, one names both.
    tied = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    load_adapter(write(tmp_path / "a", emb | head, **tied), TABLE)
    assert "q_proj.lora_A.weight' contradicts" in str(refused(write(tmp_path / "a", emb | head | pair(Q), **tied)))


def expert_forms() -> dict[str, dict[str, torch.Tensor]]:
    block = "model.layers.0.block_sparse_moe.experts"
    return {
        "one by one": pair(f"{EXPERTS}.0.gate_proj", 20, 14) | pair(f"{EXPERTS}.0.up_proj", 20, 14),
        "mixtral's": pair(f"{block}.2.w1", 20, 14) | pair(f"{block}.2.w3", 20, 14),
        "stacked": {
            f"{EXPERTS}.{leaf}.lora_{half}.weight": torch.ones(3, *shape)
            for leaf in ("w1", "w3")
            for half, shape in (("A", (2, 20)), ("B", (14, 2)))
        },
        "flattened": {f"{EXPERTS}.lora_A.weight": torch.ones(6, 20), f"{EXPERTS}.lora_B.weight": torch.ones(28, 6)},
    }


@pytest.mark.parametrize("form", expert_forms())
def test_targets_of_experts(form, tmp_path):
    """Modules by their old names or parameters: peft takes one for the other."""
    table, tensors = model_table(MIXTRAL, fused=True), expert_forms()[form]
    good = [
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj"]},
        {"target_modules": None},
    ]
    if form != "flattened":
        good.append({"target_parameters": ["experts.down_proj"], "target_modules": ["gate_proj", "up_proj"]})
    for n, config in enumerate(good):
        load_adapter(write(tmp_path / str(n), tensors, **config), table)
    error = refused(write(tmp_path / "a", tensors, target_parameters=["layers.1.mlp.experts.gate_up_proj"]), table)
    assert len(error.problems) == len(tensors) // 2 and "(not in target_parameters)" in str(error)
    if form == "flattened":  # without target_parameters the shapes decide
        load_adapter(write(tmp_path / "a", tensors, target_modules=[]), table)
        return
    for n, targets in enumerate([["w1", "w3"], ["gate_proj", "up_proj"], r".*experts\.\d+\.(w1|w3)", "all-linear"]):
        load_adapter(write(tmp_path / f"m{n}", tensors, target_modules=targets), table)
    for n, targets in enumerate([["q_proj"], ["w2"], r".*self_attn.*"]):
        error = refused(write(tmp_path / f"r{n}", tensors, target_modules=targets), table)
        assert len(error.problems) == 2 and "(not in target_modules)" in str(error)


def test_no_weights_at_all(tmp_path):
    error = refused(write(tmp_path / "a", {}, target_modules=["q_proj"]))
    assert "no weights: expected lora_A and lora_B tensors for ['q_proj'], got none" in str(error)


def test_expert_shapes(tmp_path):
    table = model_table(MIXTRAL, fused=True)
    good = {
        f"{EXPERTS}.base_layer.lora_A.weight": torch.ones(6, 20),
        f"{EXPERTS}.base_layer.lora_B.weight": torch.ones(28, 6),
        f"{EXPERTS}.lora_A.weight": torch.ones(6, 14),
        f"{EXPERTS}.lora_B.weight": torch.ones(20, 6),
    }
    load_adapter(write(tmp_path / "a", good), table)
    for key, shape in ((f"{EXPERTS}.lora_A.weight", (4, 14)), (f"{EXPERTS}.base_layer.lora_B.weight", (27, 6))):
        error = refused(write(tmp_path / "a", {**good, key: torch.ones(shape)}), table)
        assert len(error.problems) == 1
        module = key.rpartition(".lora_")[0]
        assert f"{module}.lora_A.weight' has the wrong shape: expected [6, " in str(error)
    # One more level of nesting is a parameter that no table knows: a bias.
    deep = {f"{EXPERTS}.base_layer.base_layer.lora_{h}.weight": torch.ones(6, 6) for h in "AB"}
    assert "base_layer.base_layer.lora_A.weight' matches no site" in str(
        refused(write(tmp_path / "a", good | deep), table)
    )
    one = {k: v for k, v in good.items() if "base_layer" not in k}
    error = refused(write(tmp_path / "a", one, target_parameters=["mlp.experts.gate_up_proj"]), table)
    assert "expected [6, 20] (A) and [28, 6] (B) for gate_up_proj, got [6, 14] (A) and [20, 6] (B)" in str(error)
    stacked = {f"{EXPERTS}.w1.lora_A.weight": torch.ones(2, 2, 20), f"{EXPERTS}.w1.lora_B.weight": torch.ones(3, 14, 2)}
    error = refused(write(tmp_path / "a", stacked), table)
    assert "w1.lora_A.weight' has the wrong shape: expected [3, 2, 20], got [2, 2, 20]" in str(error)
    flat = {
        f"{EXPERTS}.gate_up_proj.lora_A.weight": torch.ones(6, 20),
        f"{EXPERTS}.gate_up_proj.lora_B.weight": torch.ones(28, 6),
    }
    assert "gate_up_proj.lora_A.weight' matches no site" in str(refused(write(tmp_path / "a", flat), table))


def test_everything_wrong_is_in_one_error(tmp_path):
    tensors = {}
    for other, _ in TENSORS.values():
        tensors |= other
    tensors.pop("../model.lora_A.weight"), tensors.pop("../model.lora_B.weight")
    error = refused(write(tmp_path / "a", pair(Q) | tensors, use_dora=True, bias="all"))
    assert len(error.problems) >= 12
    text = str(error)
    for part in ("'use_dora'", "'bias'", "layers.9", "magnitude_vector", "trainable_tokens_delta", "meets another"):
        assert part in text
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


# -- files -----------------------------------------------------------------------------------------------------------


def test_missing_files_and_pickles(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    error = refused(folder)
    assert "expected adapter_model.safetensors, got none (adapter_model.bin is a pickle" in str(error)
    (folder / "adapter_config.json").unlink()
    assert len(refused(folder).problems) == 2
    with pytest.raises(AdapterError, match="expected a folder"):
        read_peft(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_the_folder(name, tmp_path):
    folder, other = write(tmp_path / "a"), write(tmp_path / "b")
    (folder / name).unlink()
    (folder / name).symlink_to(f"../b/{name}")
    assert f"link out of the folder: expected {name} inside" in str(refused(folder))
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert f"unreadable file {name}" in str(refused(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"unreadable file {name}: expected a regular file" in str(refused(folder))
    load_adapter(other, TABLE)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"LORA"', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff\xfe", '{"peft_type"}']
)
def test_config_that_is_no_config(text, tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "adapter_config.json" in str(refused(folder)) or "'peft_type'" in str(refused(folder))


def archive(header: bytes | dict, body: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


A = {"dtype": "F32", "shape": [2, 20], "data_offsets": [0, 160]}
HOSTILE = {
    "empty": b"",
    "short": b"\x08",
    "length beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "length beyond memory": struct.pack("<Q", (1 << 63) + 5) + b"{}",
    "not json": archive(b"pickle!!"),
    "not utf-8": archive(b'{"\xff": 1}'),
    "not an object": archive(b"[1, 2]"),
    "deep": archive(b'{"a":' * 5000),
    "huge shape": archive({"x": {**A, "shape": [1 << 40, 1 << 40]}}, bytes(160)),
    "shape times type overflows": archive({"x": {**A, "shape": [1 << 62, 4]}}, bytes(160)),
    "negative shape": archive({"x": {**A, "shape": [-2, 20]}}, bytes(160)),
    "offsets beyond the file": archive({"x": {**A, "data_offsets": [0, 1 << 40], "shape": [1 << 38]}}, bytes(160)),
    "offsets reversed": archive({"x": {**A, "data_offsets": [160, 0]}}, bytes(160)),
    "offsets overlap": archive({"x": A, "y": A}, bytes(160)),
    "gap": archive({"x": {**A, "data_offsets": [16, 176]}}, bytes(176)),
    "body too long": archive({"x": A}, bytes(200)),
    "body too short": archive({"x": A}, bytes(100)),
    "unknown type": archive({"x": {**A, "dtype": "F33"}}, bytes(160)),
    "no shape": archive({"x": {"dtype": "F32", "data_offsets": [0, 160]}}, bytes(160)),
    "no dimensions": archive({"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "zero size, huge shape": archive({"x": {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}}),
    "empty name": archive({"": A}, bytes(160)),
    "control characters": archive({"a\nb.lora_A.weight": A}, bytes(160)),
    "climbing name": archive({"../../etc/passwd": A}, bytes(160)),
    "twice the same name": archive(b'{"x.lora_A.weight":%b,"x.lora_A.weight":%b}' % ((json.dumps(A).encode(),) * 2)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_safetensors(what, tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(HOSTILE[what])
    refused(folder)


def test_truncation_anywhere_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 13), len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(folder)


def test_flipped_bytes_of_the_header_never_load_something_else(tmp_path):
    """Refused, or (where the flip hits something without meaning) the very same weights."""
    folder = write(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    good = load_adapter(folder, TABLE).sites
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    same = 0
    for at in range(end):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(changed))
        try:
            sites = load_adapter(folder, TABLE).sites
        except AdapterError:
            continue
        same += 1
        ((path, weights),) = sites.items()
        assert weights.a[0].shape == (2, 20) and len(weights.a) == 1
        assert path in good or path.startswith("model.layers.")
    # Digits of the path can turn into another layer's; nearly everything else is noticed.
    assert same < end // 8


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_never_gets_past_the_reader(data, tmp_path):
    folder = write(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "cut"]))
        if kind == "cut":
            del whole[at : at + data.draw(st.integers(1, 30))]
        else:
            whole[at : at + (kind == "set")] = data.draw(st.binary(min_size=1, max_size=4))
        if not whole:
            break
    file.write_bytes(bytes(whole))
    try:
        sites = load_adapter(folder, TABLE).sites
    except AdapterError:
        return
    for path, weights in sites.items():
        assert all(torch.isfinite(a).all() and a.shape[1] == TABLE.sites[path].k for a in weights.a)
