"""The pool under the real ops: each site of a small model, adapters of mixed ranks, everything unread poisoned."""

from __future__ import annotations

import pytest
import torch
from polylora.plan import Plan
from polylora.table import _ARGUMENTS
from test_pool_adapters import EXPERTS, SITES, H, apply, arenas, make_adapter, make_pool, poison_all, randn, want

ops = torch.ops.polylora
TOP_K = 2


def make_loaded_pool(device: str):
    """On the device, and the same on the CPU for the expected values (poison is the same in both)."""
    adapters = [make_adapter(f"a{i}", rank=rank, seed=i, shared=i % 2 == 1) for i, rank in enumerate((3, 8, 16, 5))]
    on_cpu = make_pool()
    for adapter in adapters:
        on_cpu.load(adapter)
    if device == "cpu":
        poison_all(on_cpu)
        return on_cpu, on_cpu, adapters
    pool = make_pool(device=device)
    for adapter in adapters:
        pool.load(adapter)
    poison_all(on_cpu)
    for ours, theirs in zip(arenas(pool), arenas(on_cpu), strict=True):
        ours.tensor.copy_(theirs.tensor)
    return pool, on_cpu, adapters


def assert_delta(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1, "a weak case: hardly any delta"
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("op", sorted(_ARGUMENTS))
def test_args_are_arguments_of_the_op(op: str):
    names = {argument.name for argument in getattr(ops, op).default._schema.arguments}
    assert set(_ARGUMENTS[op]) <= names


@pytest.mark.parametrize("path", ["qkv", "o", "embed"])
def test_dense_sites(path: str, device: str):
    pool, on_cpu, adapters = make_loaded_pool(device)
    site, table = SITES[path], pool.site(path)
    groups = [0, 1, -1, 3, 3, 2, 0, -1, 2]
    rows = len(groups)
    x = torch.arange(rows) if path == "embed" else randn(rows, site.k)
    y = torch.zeros(rows, site.width, device=device)
    plan = Plan(rows, pool.max_adapters, device=device).fill(torch.tensor(groups, device=device)).tensor
    if path == "embed":
        ops.embedding_(y=y, token_ids=x.to(device), plan=plan, **table.args("embedding_"))
    else:
        ops.linear_(y=y, x=x.to(device), plan=plan, **table.args())
    expected = want(pool, adapters, path, x, groups)
    assert_delta(y, expected)
    torch.testing.assert_close(apply(on_cpu, path, x, groups), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("path", ["gate_up", "gate_up_mixed", "down"])
def test_moe_sites(path: str, device: str):
    pool, _, adapters = make_loaded_pool(device)
    site, table = SITES[path], pool.site(path)
    token_slots = torch.tensor([0, -1, 3, 2, 1], dtype=torch.int32)
    topk_ids = torch.tensor([[0, 2], [1, 0], [2, 1], [1, 1], [0, 1]], dtype=torch.int32)
    tokens = len(token_slots)
    pairs = tokens * TOP_K
    plan = Plan(pairs, pool.max_adapters * EXPERTS, device=device)
    plan.fill_moe(topk_ids.to(device), token_slots.to(device), pool.max_adapters, EXPERTS)
    groups = [
        -1 if slot < 0 else slot * EXPERTS + int(topk_ids[token, j])
        for token, slot in enumerate(token_slots.tolist())
        for j in range(TOP_K)
    ]
    y = torch.zeros(pairs, site.width, device=device)
    if path == "down":
        x = randn(pairs, site.k)
        weights = torch.rand(tokens, TOP_K) + 0.5
        ops.moe_down_(y=y, h=x.to(device), plan=plan.tensor, topk_weights=weights.to(device), **table.args("moe_down_"))
        expected = want(pool, adapters, path, x, groups) * weights.double().reshape(-1, 1)
    else:
        x = randn(tokens, H)
        ops.moe_gate_up_(y=y, x=x.to(device), plan=plan.tensor, top_k=TOP_K, **table.args("moe_gate_up_"))
        expected = want(pool, adapters, path, x.repeat_interleave(TOP_K, 0), groups)
    assert_delta(y, expected)


@pytest.mark.parametrize("dtype_held", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pool_on_a_gpu_holds_what_one_on_the_cpu_holds(dtype_held: torch.dtype):
    """Staged through pinned memory, or straight where the weights are on the GPU already."""
    pools = [make_pool(dtype=dtype_held, device=device) for device in ("cpu", "cuda")]
    for i, rank in enumerate((3, 8, 16)):
        for pool in pools:
            adapter = make_adapter(f"a{i}", rank=rank, seed=i)
            if i == 1 and pool.device.type == "cuda":
                for weights in adapter.sites.values():
                    weights.a = [a.cuda() for a in weights.a]
                    weights.entries = [
                        [type(entry)(entry.a, entry.b.cuda(), entry.scale) for entry in row] for row in weights.entries
                    ]
            pool.load(adapter)
    for pool in pools:
        pool.unload("a0")
    cpu, gpu = pools
    for path in SITES:
        assert torch.equal(cpu.site(path).table, gpu.site(path).table.cpu())
        assert gpu.site(path).table.is_cuda and gpu.site(path).v_width == cpu.site(path).v_width
    for ours, theirs in zip(arenas(gpu), arenas(cpu), strict=True):
        assert torch.equal(ours.tensor.cpu(), theirs.tensor)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            gpu.unload("a1")
