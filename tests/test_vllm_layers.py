"""vLLM's LoRA layers on polylora's wrapper, against float64. vLLM's own files; vllm_source.py says what is not."""

from __future__ import annotations

import inspect
import os

import polylora
import pytest
import torch
import vllm_source
from torch import Tensor

vllm_source.require_vllm()

from polylora import _host  # noqa: E402
from polylora.vllm_plugin import ops, tables  # noqa: E402
from polylora.vllm_plugin.wrapper import PolyloraPunicaWrapper  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora import layers as vllm_layers  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU  # noqa: E402

SLOTS, RANK, K, VOCAB = 4, 16, 48, 40
EPS, half = vllm_source.EPS, vllm_source.half
# kind of the base, class with LoRA, widths of the slices
LINEARS = {
    "replicated": ("ReplicatedLinear", "ReplicatedLinearWithLoRA", [40]),
    "row": ("RowParallelLinear", "RowParallelLinearWithLoRA", [24]),
    "column": ("ColumnParallelLinear", "ColumnParallelLinearWithLoRA", [19]),
    "gate_up": ("MergedColumnParallelLinear", "MergedColumnParallelLinearWithLoRA", [40, 40]),
    "qkv": ("QKVParallelLinear", "MergedQKVParallelLinearWithLoRA", [64, 16, 16]),
    "variable": ("MergedColumnParallelLinear", "MergedColumnParallelLinearVariableSliceWithLoRA", [8, 24, 16, 32]),
}
HEADS = {"num_heads": 8, "num_kv_heads": 2, "total_num_heads": 8, "total_num_kv_heads": 2, "head_size": 8}


@pytest.fixture(autouse=True)
def here(device):
    """New tensors are made on the device of the test."""
    torch.manual_seed(0)
    vllm_source.calls.clear()
    tables._said.clear()
    if device == "cpu":
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def lora_config(dtype=torch.bfloat16, rank=RANK, **kwargs):
    return LoRAConfig(max_lora_rank=rank, max_loras=SLOTS, lora_dtype=dtype, **kwargs)


def make_wrapper(config, tokens=64):
    return PolyloraPunicaWrapper(tokens, 16, torch.get_default_device(), lora_config=config)


def make_linear(name, dtype, wrapper, config, k=K, widths=None, **attributes):
    """A layer with a ``wrapper``; ``k``, ``widths`` and ``attributes`` of the base where it is a part of a linear."""
    kind, with_lora, all_widths = LINEARS[name]
    values = {"num_kv_head_replicas": 1} | HEADS | attributes
    base = vllm_source.base_linear(kind, k, widths or all_widths, dtype, **values)
    layer = getattr(vllm_layers, with_lora)(base)
    layer.create_lora_weights(SLOTS, config)
    layer.set_mapping(wrapper)
    return layer


def adapter(widths, rank, dtype, absent=(), k=K):
    """A and B of each slice; None where the adapter leaves it out."""
    a = [None if s in absent else (torch.randn(rank, k) / k**0.5).to(dtype) for s in range(len(widths))]
    b = [None if s in absent else torch.randn(w, rank).to(dtype) for s, w in enumerate(widths)]
    return a, b


def put(layer, slot, weights):
    """Loads an adapter as vLLM does: tensors for a layer of one slice, lists for others."""
    a, b = weights
    layer.set_lora(slot, *((a[0], b[0]) if len(a) == 1 else (a, b)))


def layer_of_one_adapter(dtype, tokens):
    """A wrapper for ``tokens`` rows, a row-parallel layer of it with adapter 1 in slot 0, and the adapter."""
    config = lora_config(dtype)
    wrapper = make_wrapper(config, tokens)
    layer = make_linear("row", dtype, wrapper, config)
    weights = {1: adapter([24], 8, dtype)}
    put(layer, 0, weights[1])
    return wrapper, layer, weights


def step_of_ids(wrapper, ids, slot_ids, prompts=(), vocab=VOCAB):
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(prompts), is_prefill=True), slot_ids, SLOTS + 1, vocab)


def check(got: Tensor, base: Tensor, x: Tensor, ids, adapters, widths, beside: bool = True) -> None:
    """Rows with an adapter against float64, the others bit for bit; and the delta must be worth speaking of.

    ``beside``: the delta was made by itself, beside the base's GEMM, and rounded then.
    """
    want = base.double().clone()
    rounded = torch.zeros_like(want)  # what one rounding of x A^T can make of y: the fast kernels on a GPU have it
    for row, adapter_id in enumerate(ids):
        if adapter_id <= 0:
            continue
        begin = 0
        for a, b, width in zip(*adapters[adapter_id], widths, strict=True):
            if a is not None:
                v = a.double() @ x[row].double()
                want[row, begin : begin + width] += b.double() @ v
                rounded[row, begin : begin + width] = b.double().abs() @ v.abs()
            begin += width
    with_lora = torch.tensor([i > 0 for i in ids] + [False] * (len(base) - len(ids)))
    assert torch.equal(got[~with_lora], base[~with_lora])
    if with_lora.any():
        error = (got.double() - want).abs()
        bound = want.abs() + (rounded if base.is_cuda else 0) + 1e-3
        if beside:
            bound = bound + (want - base.double()).abs()
        assert (error <= EPS[base.dtype] * bound).all(), error.max()
        delta = (want - base.double())[with_lora].norm() / want[with_lora].norm()
        assert delta > 0.12


# ------------------------------------------------------------------------------------------------------ the interface


def test_methods_take_what_vllms_take():
    """Every argument of vLLM's, at its place, with its default; more may be swallowed."""
    for name in (
        "update_metadata", "add_shrink", "add_expand", "add_lora_embedding", "add_lora_linear", "add_lora_logits",
        "add_lora_w13", "add_lora_w2",
    ):  # fmt: skip
        ours, theirs = (inspect.signature(getattr(c, name)) for c in (PolyloraPunicaWrapper, PunicaWrapperGPU))
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ], name


def test_what_vllms_experts_need_is_inherited():
    for name in ("moe_lora_align_block_size", "add_lora_fused_moe"):
        assert getattr(PolyloraPunicaWrapper, name) is getattr(PunicaWrapperGPU, name)


# ------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", LINEARS)
def test_linear(name, half):
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear(name, half, wrapper, config)
    widths = LINEARS[name][2]
    adapters = {1: adapter(widths, 8, half), 7: adapter(widths, RANK, half), 9: adapter(widths, 3, half)}
    put(layer, 0, adapters[1])
    put(layer, 3, adapters[7])
    put(layer, 2, adapters[9])
    ids = [1, 0, 7, 7, -1, 9, 1, 0]
    step_of_ids(wrapper, ids, [1, None, 9, 7])
    x = torch.randn(11, K).to(half)  # three rows of padding
    check(layer(x), layer.base_layer.quant_method.apply(layer.base_layer, x), x, ids, adapters, widths)
    assert not vllm_source.calls


@pytest.mark.parametrize("name", ["gate_up", "qkv", "variable"])
def test_absent_slices(name, half):
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear(name, half, wrapper, config)
    widths = LINEARS[name][2]
    adapters = {1: adapter(widths, 8, half, absent=(1,)), 2: adapter(widths, 4, half, absent=(0,))}
    put(layer, 1, adapters[1])
    put(layer, 0, adapters[2])
    ids = [2, 1, 0, 1]
    step_of_ids(wrapper, ids, [2, 1, None, None])
    x = torch.randn(4, K).to(half)
    check(layer(x), layer.base_layer.quant_method.apply(layer.base_layer, x), x, ids, adapters, widths)
    assert layer._polylora_table.words()[1, :, 1].tolist() == [0 if s == 1 else 8 for s in range(len(widths))]


# Of two ranks: K and the slices' widths of one, and what else the base has. "replicas": both have the head of k and v.
RANKS = {
    "row": ("row", K // 2, [24], {"input_size": K}),
    "column": ("column", K, [19], {}),
    "gate_up": ("gate_up", K, [20, 20], {"output_sizes": [40, 40]}),
    "variable": ("variable", K, [4, 12, 8, 16], {"output_sizes": [8, 24, 16, 32]}),
    "qkv": ("qkv", K, [32, 8, 8], {"num_heads": 4, "num_kv_heads": 1, "total_num_heads": 8, "total_num_kv_heads": 2}),
    "replicas": (
        "qkv", K, [32, 8, 8],
        {"num_heads": 4, "num_kv_heads": 1, "total_num_heads": 8, "total_num_kv_heads": 1, "num_kv_head_replicas": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_each_of_two_tensor_parallel_ranks_takes_its_part(name, half):
    """vLLM cuts an adapter for the rank; tables and ranks are of the part."""
    kind, k, widths, more = RANKS[name]
    config = lora_config(half)
    wrapper = make_wrapper(config)
    whole = [w * (1 if kind == "row" or (name == "replicas" and s > 0) else 2) for s, w in enumerate(widths)]
    adapters = {1: adapter(whole, 8, half), 2: adapter(whole, 5, half)}
    ids = [1, 0, 2, 1]
    step_of_ids(wrapper, ids, [2, None, 1, None])
    x = torch.randn(4, K).to(half)
    for rank in range(2):
        layer = make_linear(kind, half, wrapper, config, k, widths, **more, tp_size=2, tp_rank=rank)
        put(layer, 2, adapters[1])
        put(layer, 0, adapters[2])
        part = slice(rank * k, (rank + 1) * k) if kind == "row" else slice(None)
        mine = x[:, part].contiguous()
        of_rank = {
            i: (
                [t[:, part] for t in a],
                [t if len(t) == w else t.chunk(2)[rank] for t, w in zip(b, widths, strict=True)],
            )
            for i, (a, b) in adapters.items()
        }
        base = layer.base_layer.quant_method.apply(layer.base_layer, mine)
        check(layer.apply(mine), base, mine, ids, of_rank, widths)
        assert layer._polylora_table.words()[[0, 2], :, 1].tolist() == [[5] * len(widths), [8] * len(widths)]
    assert not vllm_source.calls


def test_one_adapter_over_several_slices(half):
    """Two weights for four slices (in_proj_qkv and in_proj_z), and one for all."""
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("variable", half, wrapper, config)
    widths = LINEARS["variable"][2]
    (a_qkv, a_z), (b_qkv, b_z) = adapter([48, 32], 8, half)
    a_z, b_z = a_z[:4], b_z[:, :4]
    layer.set_lora(0, [a_qkv, a_z], [b_qkv, b_z])
    (a_all,), (b_all,) = adapter([80], 5, half)
    layer.set_lora(1, a_all, b_all)
    assert layer._polylora_table.words()[:2, :, 1].tolist() == [[8, 8, 8, 4], [5, 5, 5, 5]]
    adapters = {1: ([a_qkv] * 3 + [a_z], [*b_qkv.split(widths[:3]), b_z]), 2: ([a_all] * 4, b_all.split(widths))}
    ids = [1, 2, 0]
    step_of_ids(wrapper, ids, [1, 2, None, None])
    x = torch.randn(3, K).to(half)
    check(layer(x), layer.base_layer.quant_method.apply(layer.base_layer, x), x, ids, adapters, widths)


def test_slots_change_under_the_same_tensors(half):
    """Other mappings, other adapters, other ranks, removal: at the addresses that a captured graph would hold."""
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("qkv", half, wrapper, config)
    widths = LINEARS["qkv"][2]
    table = layer._polylora_table
    addresses = [t.data_ptr() for t in (wrapper._tokens.rows, table.table, *table.a, *table.b)]
    assert [t.data_ptr() for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)] == addresses[2:]
    x = torch.randn(6, K).to(half)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    adapters = {1: adapter(widths, 16, half), 2: adapter(widths, 4, half)}
    put(layer, 0, adapters[1])
    for ids in ([1] * 6, [0, 1, 0, 1, 1, 0], [1], [0] * 6, []):
        step_of_ids(wrapper, ids, [1, None, None, None])
        check(layer(x), base, x, ids, adapters, widths)
    put(layer, 0, adapters[2])  # of a lower rank, in the same slot
    assert table.words()[0, :, 1].tolist() == [4, 4, 4]
    step_of_ids(wrapper, [2, 2, 0, 2], [2, None, None, None])
    check(layer(x), base, x, [2, 2, 0, 2], adapters, widths)
    layer.reset_lora(0)
    assert not table.words()[0, :, 1].any()
    assert torch.equal(layer(x), base)
    now = [t.data_ptr() for t in (wrapper._tokens.rows, table.table, *table.a, *table.b)]
    assert now == addresses


def test_padding_beyond_the_true_rank_is_not_read(half):
    """The ranks do arrive: with NaN behind them nothing changes."""
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("gate_up", half, wrapper, config)
    widths = LINEARS["gate_up"][2]
    adapters = {3: adapter(widths, 5, half)}
    put(layer, 2, adapters[3])
    for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
        a[2, 0, 5:], b[2, 0, :, 5:], a[0], b[1] = (float("nan"),) * 4
    step_of_ids(wrapper, [3, 0, 3], [None, None, 3, None])
    x = torch.randn(3, K).to(half)
    check(layer(x), layer.base_layer.quant_method.apply(layer.base_layer, x), x, [3, 0, 3], adapters, widths)


def test_slots_filled_before_the_wrapper_came(half):
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("gate_up", half, object(), config)
    widths = LINEARS["gate_up"][2]
    adapters = {1: adapter(widths, 5, half)}
    put(layer, 1, adapters[1])
    layer.set_mapping(wrapper)
    assert layer._polylora_table.words()[:, :, 1].tolist() == [[0, 0], [RANK, RANK], [0, 0], [0, 0]]
    step_of_ids(wrapper, [1, 0], [None, 1, None, None])
    x = torch.randn(2, K).to(half)
    check(layer(x), layer.base_layer.quant_method.apply(layer.base_layer, x), x, [1, 0], adapters, widths)


def test_set_mapping_twice_follows_once(half):
    config = lora_config(half)
    layer = make_linear("row", half, make_wrapper(config), config)
    table, hook = layer._polylora_table, layer.set_lora
    layer.set_mapping(make_wrapper(config))
    assert layer._polylora_table is table and layer.set_lora is hook


def test_a_layer_that_is_gone_leaves_nothing(half):
    config = lora_config(half)
    layer = make_linear("row", half, make_wrapper(config), config)
    address = layer.lora_a_stacked[0].data_ptr()
    assert address in tables._BY_A
    del layer
    import gc

    gc.collect()
    assert address not in tables._BY_A


def test_embedding(half):
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = vllm_layers.VocabParallelEmbeddingWithLoRA(vllm_source.base_embedding(VOCAB, 32, half))
    layer.create_lora_weights(SLOTS, config)
    layer.set_mapping(wrapper)
    adapters = {1: adapter([32], 7, half, k=VOCAB), 2: adapter([32], RANK, half, k=VOCAB)}
    put(layer, 3, adapters[1])
    put(layer, 1, adapters[2])
    assert layer._polylora_table.words()[:, 0, 1].tolist() == [0, RANK, 0, 7]
    ids = [1, 2, 0, 1, 2]
    step_of_ids(wrapper, ids, [None, 2, None, 1])
    tokens = torch.randint(VOCAB, (8,))
    one_hot = torch.nn.functional.one_hot(tokens, VOCAB)
    check(layer(tokens), layer.base_layer(tokens), one_hot, ids, adapters, [32], beside=False)
    assert not vllm_source.calls


def make_logits(config, wrapper, dtype, logits_dtype):
    head = vllm_source.PlainHead(VOCAB, (torch.randn(VOCAB, K) / K**0.5).to(dtype), logits_dtype)
    layer = vllm_layers.LogitsProcessorWithLoRA.__new__(vllm_layers.LogitsProcessorWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.base_layer, layer.hidden_size, layer.dtype, layer.device = head, K, dtype, torch.get_default_device()
    layer.sharded_to_full_mapping = None
    layer.create_lora_weights(SLOTS, config)
    layer.set_mapping(wrapper)
    return layer


def logits_of_two_adapters(dtype):
    """A wrapper, a layer of logits with adapters 1 and 2 in slots 0 and 1, and the adapters."""
    config = lora_config(dtype)
    wrapper = make_wrapper(config)
    layer = make_logits(config, wrapper, dtype, dtype)
    adapters = {1: adapter([VOCAB], 8, dtype), 2: adapter([VOCAB], 3, dtype)}
    put(layer, 0, adapters[1])
    put(layer, 1, adapters[2])
    return wrapper, layer, adapters


def test_logits_go_by_prompts(half):
    wrapper, layer, adapters = logits_of_two_adapters(half)
    step_of_ids(wrapper, [1, 1, 2, 2, 2], [1, 2, None, None], prompts=[2, 0, 1])
    x = torch.randn(4, K).to(half)
    base = layer.base_layer._apply_head(None, x, None)
    check(layer._get_logits(x, object()), base, x, [2, 0, 1], adapters, [VOCAB], beside=False)
    assert not vllm_source.calls


def test_drafts_have_logits_of_their_own(half):
    """Speculative decoding: several rows of logits a sequence, more than the largest step has sequences."""
    wrapper, layer, adapters = logits_of_two_adapters(half)
    prompts = [i for i in (1, 2, 0) * 5 for _ in range(4)]  # 15 sequences, three drafts and a token each
    step_of_ids(wrapper, prompts, [1, 2, None, None], prompts=prompts)
    x = torch.randn(len(prompts), K).to(half)
    base = layer.base_layer._apply_head(None, x, None)
    check(layer._get_logits(x, object()), base, x, prompts, adapters, [VOCAB], beside=False)
    step_of_ids(wrapper, [1, 2], [1, 2, None, None], prompts=[1, 2])  # none was accepted: nothing is left of them
    check(layer._get_logits(x, object()), base, x, [1, 2], adapters, [VOCAB], beside=False)
    assert not vllm_source.calls


# ------------------------------------------------------------------------------------------------- shrink and expand


def test_shrink_and_expand(half):
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("qkv", half, wrapper, config)
    widths = LINEARS["qkv"][2]
    adapters = {1: adapter(widths, 6, half), 2: adapter(widths, RANK, half, absent=(1,))}
    put(layer, 0, adapters[1])
    put(layer, 3, adapters[2])
    ids = [1, 0, 2, 2]
    step_of_ids(wrapper, ids, [1, None, None, 2])
    x = torch.randn(5, K).to(half)
    v = torch.full((3, 5, RANK), float("nan"))
    wrapper.add_shrink(v, x, layer.lora_a_stacked, 1.0)
    for row, i in enumerate([*ids, 0]):
        for s in range(3):
            a = adapters[i][0][s] if i else None
            want = torch.zeros(RANK, dtype=torch.float64)
            if a is not None:
                want[: a.size(0)] = a.double() @ x[row].double()
            torch.testing.assert_close(v[s, row].double(), want, rtol=1e-5, atol=1e-5)
    base = torch.randn(5, 8 + sum(widths)).to(half)
    y = base.clone()
    wrapper.add_expand(y, v, layer.lora_b_stacked, tuple(widths), offset_start=8, add_input=True)
    assert torch.equal(y[:, :8], base[:, :8])
    check(y[:, 8:], base[:, 8:], x, ids, adapters, widths, beside=False)
    assert not vllm_source.calls


def test_shrink_by_tensors_of_no_layer(half):
    """Classification heads shrink by weights that no set_lora fills: all of them are used."""
    wrapper = make_wrapper(lora_config(half))
    weights = torch.randn(SLOTS, 1, 5, K).to(half)
    step_of_ids(wrapper, [1, 0, 2], [2, 1, None, None])
    x = torch.randn(3, K).to(half)
    v = torch.empty(1, 3, 5)
    wrapper.add_shrink(v, x, (weights,), 1.0)
    want = torch.stack([weights[1, 0].double() @ x[0].double(), torch.zeros(5), weights[0, 0].double() @ x[2].double()])
    torch.testing.assert_close(v[0].double(), want, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- what vLLM's kernels still do


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "vllm.polylora"]


def test_output_of_another_dtype(caplog):
    """A router with fp32 output: vLLM's kernels serve it, from metadata that ours filled."""
    config = lora_config()
    wrapper = make_wrapper(config)
    kind, with_lora, widths = LINEARS["replicated"]
    base = vllm_source.base_linear(kind, K, widths, torch.bfloat16, out_dtype=torch.float32)
    layer = vllm_layers.ReplicatedLinearWithLoRA(base)
    layer.create_lora_weights(SLOTS, config)
    layer.set_mapping(wrapper)
    adapters = {1: adapter(widths, 8, torch.bfloat16), 2: adapter(widths, 4, torch.bfloat16)}
    put(layer, 3, adapters[1])
    put(layer, 0, adapters[2])
    ids = [1, 0, 2, 1, 2, 2, 0]
    step_of_ids(wrapper, ids, [2, None, None, 1])
    x = torch.randn(7, K).to(torch.bfloat16)
    layer(x)
    assert vllm_source.calls == ["lora_shrink", "lora_expand"]
    got, base = layer(x).double(), base.quant_method.apply(base, x).double()
    for row, i in enumerate(ids):
        if i:
            (a,), (b,) = adapters[i]
            base[row] += b.double() @ (a.double() @ x[row].double())
    torch.testing.assert_close(got, base, rtol=0, atol=1e-5 if base.device.type == "cpu" else 5e-2)
    assert said(caplog) == [
        "polylora: layers with an output of torch.float32 for an input of torch.bfloat16 keep vLLM's kernels."
    ]


def test_fp32_logits(caplog):
    config = lora_config()
    wrapper = make_wrapper(config)
    layer = make_logits(config, wrapper, torch.bfloat16, torch.float32)
    put(layer, 0, adapter([VOCAB], 8, torch.bfloat16))
    step_of_ids(wrapper, [1], [1, None, None, None], prompts=[1])
    layer._get_logits(torch.randn(1, K).to(torch.bfloat16), object())
    assert vllm_source.calls == ["lora_shrink", "lora_expand"] and len(said(caplog)) == 1


def test_ranks_above_ours(caplog):
    config = lora_config(rank=320)
    wrapper = make_wrapper(config)
    layer = make_linear("row", torch.bfloat16, wrapper, config)
    assert said(caplog) == [
        "polylora: RowParallelLinearWithLoRA keeps vLLM's kernels: slots of rank 320 (the most is 256)."
    ]
    put(layer, 0, adapter([24], 300, torch.bfloat16))
    step_of_ids(wrapper, [1], [1, None, None, None])
    layer(torch.randn(1, K).to(torch.bfloat16))
    assert vllm_source.calls == ["lora_shrink", "lora_expand"]


def test_fp8_slots(caplog):
    """vLLM has kernels for such that none of its layers calls."""
    config = lora_config(torch.float8_e4m3fn)
    wrapper = make_wrapper(config)
    layer = make_linear("qkv", torch.bfloat16, wrapper, config)
    assert said(caplog) == [
        "polylora: MergedQKVParallelLinearWithLoRA keeps vLLM's kernels: LoRA weights of torch.float8_e4m3fn."
    ]
    put(layer, 0, adapter(LINEARS["qkv"][2], 8, torch.bfloat16))
    step_of_ids(wrapper, [1], [1, None, None, None])
    layer(torch.randn(1, K).to(torch.bfloat16))
    assert vllm_source.calls == ["lora_shrink", "lora_expand"]


def test_fully_sharded(caplog):
    config = lora_config(fully_sharded_loras=True)
    wrapper = make_wrapper(config)
    base = vllm_source.base_linear("RowParallelLinear", K, [24], torch.bfloat16)
    layer = vllm_layers.RowParallelLinearWithShardedLoRA(base)
    layer.create_lora_weights(SLOTS, config)
    layer.set_mapping(wrapper)
    assert said(caplog) == ["polylora: RowParallelLinearWithShardedLoRA keeps vLLM's kernels: fully sharded LoRA."]
    adapters = {1: adapter([24], 8, torch.bfloat16)}
    put(layer, 0, adapters[1])
    step_of_ids(wrapper, [1, 0], [1, None, None, None])
    x = torch.randn(2, K).to(torch.bfloat16)
    check(layer(x), base.quant_method.apply(base, x), x, [1, 0], adapters, [24], beside=False)
    assert vllm_source.calls == ["lora_shrink", "lora_expand"]


# ---------------------------------------------------------------------------------------------------------- the step


def test_metadata_is_vllms(half):
    """All that vLLM's kernels and layers read, as its own wrapper fills it; behind the step's rows no adapter."""
    config = lora_config(half, specialize_active_lora=True)
    ours, theirs = make_wrapper(config), PunicaWrapperGPU(64, 16, torch.get_default_device(), lora_config=config)
    slot_ids = [5, None, 2, 9]
    for ids, prompts in (([5, 2, 0, 5, 5, 9], [5, 2, 9]), ([2] * 64, [2]), ([0, 0], [0]), ([9, 0, 9], [9, 0])):
        step_of_ids(ours, ids, slot_ids, prompts)
        step_of_ids(theirs, ids, slot_ids, prompts)
        n = len(ids)
        for name in ("token_lora_indices", "sampler_indices", "indices_len"):
            assert list(getattr(ours, name)) == list(getattr(theirs, name)), name
        embeddings = [w._embeddings_indices.view(-1, 64)[-1, :n].tolist() for w in (ours, theirs)]
        assert embeddings[0] == embeddings[1]
        for meta in ("token_mapping_meta", "prompt_mapping_meta"):
            a, b = getattr(ours, meta), getattr(theirs, meta)
            n = len(ids) if meta.startswith("token") else len(prompts)
            assert (a.token_lora_mapping[n:] == -1).all()
            for field in ("active_lora_ids", "num_tokens_per_lora", "lora_token_start_loc", "no_lora_flag_cpu"):
                assert torch.equal(getattr(a, field), getattr(b, field)), field
            assert torch.equal(a.num_active_loras_cpu, b.num_active_loras_cpu)
            if any(prompts if n == len(prompts) else ids):
                assert a.token_lora_mapping[:n].tolist() == b.token_lora_mapping[:n].tolist()
                order = "token_indices_sorted_by_lora_ids"
                assert torch.equal(getattr(a, order)[:n], getattr(b, order)[:n])


def test_unknown_adapter():
    wrapper = make_wrapper(lora_config())
    with pytest.raises(KeyError, match="number 4 is in no slot"):
        step_of_ids(wrapper, [1, 4], [1, None, None, None])


@pytest.mark.parametrize("made, used", [(True, False), (False, True)])
def test_steps_come_in_another_mode_than_the_wrapper(made, used):
    with torch.inference_mode(made):
        wrapper = make_wrapper(lora_config())
    with torch.inference_mode(used):
        step_of_ids(wrapper, [7, -1], [7, None])
    assert wrapper.token_mapping_meta.token_lora_mapping[:2].tolist() == [0, -1]


def test_too_many_rows():
    wrapper = make_wrapper(lora_config(), tokens=64)
    with pytest.raises(ValueError, match="up to 256 rows, got 257"):
        step_of_ids(wrapper, [1] * 257, [1, None, None, None])


def test_one_plan_a_forward_pass(monkeypatch, half):
    from vllm.forward_context import create_forward_context, override_forward_context

    config = lora_config(half)
    wrapper = make_wrapper(config)
    layers = [make_linear(name, half, wrapper, config) for name in ("gate_up", "row")]
    adapters = [{1: adapter(LINEARS[name][2], 8, half)} for name in ("gate_up", "row")]
    for layer, weights in zip(layers, adapters, strict=True):
        put(layer, 0, weights[1])
    planned = vllm_source.note_calls(monkeypatch, ("plan",), lambda name, plan, ids, groups: ids.size(0))
    context = inspect.signature(create_forward_context)
    needed = {name: {} for name, p in context.parameters.items() if p.default is p.empty and name == "attn_metadata"}
    config_stub = type("Config", (), {})()
    config_stub.compilation_config = type("C", (), {"static_forward_context": {}, "fast_moe_cold_start": False})()
    config_stub.parallel_config = config_stub.model_config = None

    def forward(rows, ids):
        step_of_ids(wrapper, ids, [1, None, None, None])
        x = torch.randn(rows, K).to(half)
        with override_forward_context(create_forward_context(**needed, vllm_config=config_stub)):
            for layer, weights, name in zip(layers, adapters, ("gate_up", "row"), strict=True):
                base = layer.base_layer.quant_method.apply(layer.base_layer, x)
                check(layer(x), base, x, ids, weights, LINEARS[name][2])

    forward(4, [1, 0, 1])
    assert planned == [4]
    forward(4, [0, 1, 1, 1])
    assert planned == [4, 4]
    forward(8, [1, 1])
    forward(4, [0, 0, 0])  # no LoRA: no kernel
    assert planned == [4, 4, 8]


def test_other_row_counts_and_wrappers_in_one_pass(half):
    """They share a forward context (drafts, towers), and one wrapper's plans a buffer: each is made anew."""
    from vllm.forward_context import override_forward_context

    config = lora_config(half)
    language, tower = make_wrapper(config), make_wrapper(config)
    step_of_ids(language, [1, 0, 2, 1], [1, 2, None, None])
    step_of_ids(tower, [2, 2, 2, 0], [1, 2, None, None])

    def head(slots, plan):  # counts and the rows' groups: what comes behind is written as far as these say
        return plan[: _host.PLAN_HEADER_WORDS + len(slots)].tolist()

    with override_forward_context(type("Context", (), {})()):
        for slots, steps in (
            ([0, -1, 1, 0], language._tokens), ([0, -1], language._tokens), ([1, 1, 1, -1], tower._tokens),
            ([0, -1, 1, 0, -1], language._tokens), ([0, -1, 1, 0], language._tokens),
        ):  # fmt: skip
            want = polylora.Plan(len(slots), SLOTS, device=torch.get_default_device())
            want.fill(torch.tensor(slots, dtype=torch.int32))
            assert head(slots, steps.plan(len(slots))) == head(slots, want.tensor)


@pytest.mark.parametrize("rows", [1, ops.BESIDE_ROWS, ops.BESIDE_ROWS + 1])
def test_few_rows_are_made_beside_the_base(monkeypatch, half, rows):
    """And more are not; nor are those of a call that no layer announced, or announced with another input."""
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("gate_up", half, wrapper, config)
    weights = {1: adapter(LINEARS["gate_up"][2], 8, half)}
    put(layer, 2, weights[1])
    ids = [1, 0, 1] * rows
    step_of_ids(wrapper, ids[:rows], [None, None, 1, None])
    called = vllm_source.note_calls(monkeypatch, ("linear_", "linear_delta", "add_delta_"))
    x = torch.randn(rows, K).to(half)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    check(layer(x), base, x, ids[:rows], weights, LINEARS["gate_up"][2], beside=rows <= ops.BESIDE_ROWS)
    assert called == (["linear_delta", "add_delta_"] if rows <= ops.BESIDE_ROWS else ["linear_"])
    called.clear()
    y = base.clone()
    wrapper.before_base(x.clone(), layer.lora_a_stacked)
    for _ in range(2):
        y.copy_(base)
        wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
        check(y, base, x, ids[:rows], weights, LINEARS["gate_up"][2], beside=False)
    assert called == ["linear_", "linear_"] and wrapper._tokens.fork is None
    wrapper.before_base(x, layer.lora_a_stacked)
    assert (wrapper._tokens.fork is not None) == (rows <= ops.BESIDE_ROWS)
    step_of_ids(wrapper, [1], [None, None, 1, None])
    assert wrapper._tokens.fork is None, "of a pass that ended before its layer did"


@pytest.mark.parametrize("name, value", [("POLYLORA_VLLM_BESIDE", "0"), ("POLYLORA_BATCH_INVARIANT", "1")])
def test_what_keeps_deltas_from_being_made_beside(monkeypatch, name, value):
    config = lora_config()
    wrapper = make_wrapper(config, tokens=80)
    layer = make_linear("row", torch.bfloat16, wrapper, config)
    put(layer, 0, adapter([24], 8, torch.bfloat16))
    x = torch.randn(ops.BESIDE_ROWS + 1, K).to(torch.bfloat16)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)

    def rows_of_a_step(rows):
        step_of_ids(wrapper, [1] * rows, [1, None, None, None])
        y = base[:rows].clone()  # the base's own GEMM need not be invariant
        wrapper.before_base(x[:rows], layer.lora_a_stacked)
        forked = wrapper._tokens.fork is not None
        wrapper.add_lora_linear(y, x[:rows], layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
        return y[:8], forked

    assert rows_of_a_step(8)[1]
    monkeypatch.setenv(name, value)
    few, forked = rows_of_a_step(8)
    assert not forked
    if name == "POLYLORA_BATCH_INVARIANT":
        for rows in (ops.BESIDE_ROWS, ops.BESIDE_ROWS + 1):
            assert torch.equal(rows_of_a_step(rows)[0], few)


def test_hidden_states_that_are_no_matrix(half):
    """Projectors of vision towers drop a token of each image by a slice, which no view makes a matrix."""
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("row", half, wrapper, config)
    weights = {1: adapter([24], 8, half)}
    put(layer, 0, weights[1])
    step_of_ids(wrapper, [1, 0, 1, 1, 0, 1, 0, 1], [1, None, None, None])
    for x in (torch.randn(2, 5, K).to(half)[:, 1:], torch.randn(2, 4, K).to(half)):
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        base = layer.base_layer.quant_method.apply(layer.base_layer, x)
        check(y.flatten(0, 1), base.flatten(0, 1), x.flatten(0, 1), [1, 0, 1, 1, 0, 1, 0, 1], weights, [24])


@pytest.mark.parametrize("seen", ["matrix", "batch of one"])
@pytest.mark.parametrize("rows", [5, 70])
def test_hidden_states_through_a_transpose(half, seen, rows):
    """State space layers without a state, convolutional towers: vLLM's kernels copy what does not lie row by row."""
    wrapper, layer, weights = layer_of_one_adapter(half, 80)
    ids = [1, 0, 1, 0, 1] * (rows // 5)
    step_of_ids(wrapper, ids, [1, None, None, None])
    x = torch.randn(K, rows).to(half).T
    x = x if seen == "matrix" else x.unsqueeze(0)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    check(y.view(rows, -1), base.view(rows, -1), x.reshape(rows, K), ids, weights, [24])
    a = torch.zeros(1, rows, RANK)
    wrapper.add_shrink(a, x, layer.lora_a_stacked, 1.0)
    assert a.any()


def test_a_graph_captured_before_the_first_step_holds_loras_kernels(monkeypatch, half):
    """Vision towers have a wrapper of their own, and graphs before anyone tells it of a step."""
    wrapper, layer, weights = layer_of_one_adapter(half, 80)
    vllms = PunicaWrapperGPU(64, 16, torch.get_default_device(), lora_config=lora_config(half))
    for mine, theirs in ((wrapper.token_mapping_meta, vllms.token_mapping_meta),
                         (wrapper.prompt_mapping_meta, vllms.prompt_mapping_meta)):  # fmt: skip
        assert mine.no_lora_flag_cpu.item() == theirs.no_lora_flag_cpu.item()
    called = vllm_source.note_calls(monkeypatch, ("plan", "linear_"))
    x = torch.randn(70, K).to(half)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    assert torch.equal(layer(x), base) and called == ["plan", "linear_"]
    step_of_ids(wrapper, [0] * 70, [1, None, None, None])
    assert torch.equal(layer(x), base) and called == ["plan", "linear_"]


@pytest.mark.parametrize("rows", [4, 100])
def test_vllms_batch_invariance_is_ours(monkeypatch, half, rows):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("POLYLORA_BATCH_INVARIANT", "0")
    config = lora_config(half)
    make_wrapper(config)
    assert os.environ["POLYLORA_BATCH_INVARIANT"] == "0", "who says otherwise has the last word"
    monkeypatch.delenv("POLYLORA_BATCH_INVARIANT")
    wrapper = make_wrapper(config, tokens=128)
    assert os.environ["POLYLORA_BATCH_INVARIANT"] == "1"
    layer = make_linear("qkv", half, wrapper, config)
    widths = LINEARS["qkv"][2]
    for slot in range(2):
        put(layer, slot, adapter(widths, 8, half))
    x = torch.randn(rows, K).to(half)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    monkeypatch.setattr(layer.base_layer.quant_method, "apply", lambda *args: base.clone())  # need not be invariant
    ids = [1] * (rows - 1)
    found = []
    for last in (0, 2):
        step_of_ids(wrapper, [*ids, last], [1, 2, None, None])
        found.append(layer(x)[: rows - 1])
    assert torch.equal(*found)


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.cuda_only
def test_captured_graph_sees_later_steps(half, device):
    """One capture, of more rows than any step has; then other mappings, adapters, ranks, and none at all."""
    from vllm.forward_context import override_forward_context

    config = lora_config(half)
    wrapper = make_wrapper(config)
    layers = [make_linear(name, half, wrapper, config) for name in ("gate_up", "qkv")]
    widths = [LINEARS[name][2] for name in ("gate_up", "qkv")]
    adapters = [{i: adapter(w, r, half) for i, r in ((1, 8), (2, RANK), (3, 5))} for w in widths]
    x, outs = torch.randn(32, K).to(half), []
    bases = [layer.base_layer.quant_method.apply(layer.base_layer, x) for layer in layers]

    def load(slot, i):
        for layer, weights in zip(layers, adapters, strict=True):
            put(layer, slot, weights[i])

    def forward():
        with override_forward_context(type("Context", (), {})()):
            return [layer(x) for layer in layers]

    load(0, 1)
    step_of_ids(wrapper, [1] * 32, [1, None, None, None])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = forward()
    slots = [1, None, None, None]
    for ids, slot, new in (([1, 0] * 4, 0, 1), ([2, 1, 2], 3, 2), ([0, 3], 0, 3), ([0] * 32, 1, 1), ([], 2, 1)):
        slots = [None if i == new else i for i in slots]
        slots[slot] = new
        load(slot, new)
        step_of_ids(wrapper, ids, slots)
        graph.replay()
        for out, base, weights, w in zip(outs, bases, adapters, widths, strict=True):
            check(out, base, x, ids, weights, w)


@pytest.mark.cuda_only
def test_layers_on_two_streams_have_plans_of_their_own(half, device):
    """Shared experts on a second stream, beside the gate: who comes second must not read the plan of the last step."""
    from vllm.forward_context import override_forward_context

    config = lora_config(half)
    wrapper = make_wrapper(config, tokens=128)
    layers = [make_linear(name, half, wrapper, config) for name in ("row", "qkv")]
    widths = [LINEARS[name][2] for name in ("row", "qkv")]
    adapters = [{i: adapter(w, 8, half) for i in (1, 2)} for w in widths]
    for layer, weights in zip(layers, adapters, strict=True):
        for slot in range(2):
            put(layer, slot, weights[slot + 1])
    x = torch.randn(100, K).to(half)
    bases = [layer.base_layer.quant_method.apply(layer.base_layer, x) for layer in layers]
    aux = torch.cuda.Stream()
    for ids in ([1, 2] * 50, [2, 1] * 50, [0, 2] * 50):
        step_of_ids(wrapper, ids, [1, 2, None, None])
        aux.wait_stream(torch.cuda.current_stream())
        with override_forward_context(type("Context", (), {})()):
            with torch.cuda.stream(aux):
                torch.cuda._sleep(50_000_000)  # cycles: 25 ms and more, far longer than the host takes
                late = layers[0](x)
            soon = layers[1](x)
        torch.cuda.synchronize()
        for y, base, weights, w in zip((late, soon), bases, adapters, widths, strict=True):
            check(y, base, x, ids, weights, w)


@pytest.mark.cuda_only
def test_other_rows_between_the_pieces_of_a_graph(half, device):
    """What runs eagerly there plans for rows of its own; the later pieces go on with the plan of the first."""
    from vllm.forward_context import override_forward_context

    wrapper, layer, weights = layer_of_one_adapter(half, 128)
    x = torch.randn(100, K).to(half)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    step_of_ids(wrapper, [1] * 100, [1, None, None, None])
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        layer(x)
    torch.cuda.synchronize()
    pieces, outs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    with override_forward_context(type("Context", (), {})()):
        for piece in pieces:
            with torch.cuda.graph(piece):
                outs.append(layer(x))
    ids = [0, 1, 1, 0] * 25
    step_of_ids(wrapper, ids, [1, None, None, None])
    pieces[0].replay()
    with override_forward_context(type("Context", (), {})()):
        check(layer(x[:70]), base[:70], x[:70], ids[:70], weights, [24])
    pieces[1].replay()
    for out in outs:
        check(out, base, x, ids, weights, [24])


@pytest.mark.cuda_only
def test_a_step_does_not_wait_for_the_device(half, device):
    """Neither the mapping nor the layers: CUDA is told to raise where a call would synchronise."""
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear("qkv", half, wrapper, config)
    put(layer, 0, adapter(LINEARS["qkv"][2], 8, half))
    x = torch.randn(3, K).to(half)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_of_ids(wrapper, [1, 0, 1], [1, None, None, None])
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["row", "qkv"])
def test_compiled_without_a_break(name):
    """Traced once, with vLLM's setting fullgraph=True; later steps, adapters and the flag of no LoRA are seen."""
    half = torch.bfloat16
    config = lora_config(half)
    wrapper = make_wrapper(config)
    layer = make_linear(name, half, wrapper, config)
    widths = LINEARS[name][2]
    adapters = {1: adapter(widths, 8, half), 2: adapter(widths, 4, half)}
    put(layer, 0, adapters[1])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step_of_ids(wrapper, [0] * 6, [1, None, None, None])  # as when vLLM profiles
    forward = torch.compile(layer.forward, fullgraph=True, backend=backend, dynamic=True)
    x = torch.randn(6, K).to(half)
    base = layer.base_layer.quant_method.apply(layer.base_layer, x)
    assert torch.equal(forward(x), base)
    step_of_ids(wrapper, [1, 0, 1], [1, None, None, None])
    check(forward(x), base, x, [1, 0, 1], adapters, widths)
    put(layer, 0, adapters[2])
    step_of_ids(wrapper, [2, 2], [2, None, None, None])
    check(forward(x), base, x, [2, 2], adapters, widths)
    assert len(graphs) == 1
    text = graphs[0].print_readable(print_output=False)
    assert "polylora_vllm.before_base" in text and "polylora_vllm.linear" in text


def test_compiled_fallback_is_said(caplog):
    config = lora_config()
    wrapper = make_wrapper(config)
    y, x = torch.zeros(2, 24), torch.randn(2, K).to(torch.bfloat16)
    layer = make_linear("row", torch.bfloat16, wrapper, config)

    def forward(y, x):
        declined = wrapper._declines(y, x, layer.lora_b_stacked, RANK, 1.0)
        return y + 1 if declined else y

    assert torch.equal(torch.compile(forward, fullgraph=True, backend="eager")(y, x), y + 1)
    assert len(said(caplog)) == 1


def test_no_copy_of_y_under_inductor(monkeypatch):
    """Where y is the base's fresh output, adding in place needs no clone of it. With vLLM's setting of Inductor."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr("torch._inductor.config.enable_auto_functionalized_v2", False)
    config = lora_config()
    wrapper = make_wrapper(config)
    layer = make_linear("row", torch.bfloat16, wrapper, config)
    put(layer, 0, adapter([24], 8, torch.bfloat16))
    step_of_ids(wrapper, [1, 0, 1], [1, None, None, None])
    x = torch.randn(3, K).to(torch.bfloat16)
    got, (code, *_) = run_and_get_code(torch.compile(layer.forward, fullgraph=True), x)
    assert torch.equal(got, layer(x))
    assert "polylora_vllm.linear" in code and "clone" not in code and ".copy_(" not in code


def test_ops_pass_opcheck():
    config = lora_config()
    wrapper = make_wrapper(config)
    layer = make_linear("row", torch.bfloat16, wrapper, config)
    put(layer, 0, adapter([24], 8, torch.bfloat16))
    rows = wrapper._tokens.rows
    x, y, v = torch.randn(3, K).to(torch.bfloat16), torch.zeros(3, 24).to(torch.bfloat16), torch.zeros(1, 3, RANK)
    a, b = list(layer.lora_a_stacked), list(layer.lora_b_stacked)
    no_lora = torch.tensor([True], device="cpu")  # opcheck clones the tensors, whose addresses count
    tests, vllm_ops = ("test_schema", "test_faketensor"), torch.ops.polylora_vllm
    torch.library.opcheck(vllm_ops.shrink, (v, x, a, rows, no_lora), test_utils=tests)
    turn = wrapper._tokens.turn
    torch.library.opcheck(vllm_ops.before_base, (turn, x, a, rows, no_lora), test_utils=tests)
    torch.library.opcheck(vllm_ops.linear, (y, x, a, b, rows, no_lora, turn), test_utils=tests)
    torch.library.opcheck(vllm_ops.expand, (y, v, b, rows, no_lora, 0), test_utils=tests)
    with pytest.raises(LookupError, match=r"a\[0\] must be a layer's whose set_mapping was called"):
        vllm_ops.linear(y, x, [t.clone() for t in a], b, rows, ~no_lora, turn)
    with pytest.raises(LookupError, match="rows must be a PolyloraPunicaWrapper's"):
        vllm_ops.linear(y, x, a, b, rows.clone(), ~no_lora, turn)
