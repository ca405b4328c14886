"""Offsets beyond 2^31 elements. On the CPU the arenas are never touched but at the end, so they cost no memory."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
import torch
from cases import make_adapter, make_moe_case, ops, plan_rows, randn

BIG = 2**31 + 2**20
GEN = torch.Generator().manual_seed(11)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order_of_tests() -> None:
    GEN.manual_seed(11)


def huge(device: str, elements: int) -> torch.Tensor:
    """bf16, 4.3 GB, unwritten."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 4 * elements:
        pytest.skip("not enough memory")
    try:
        return torch.empty(elements, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no {elements} elements: {error}")


def one_entry(adapter, a_row: int, b_offset: int, device: str, groups: int = 2) -> torch.Tensor:
    """Group 1 of ``groups`` has the adapter; the others nothing."""
    entries = np.zeros((groups, 1), dtype=ref.ENTRY)
    rank = adapter.rank(0)
    entries[1, 0] = (a_row, rank, 0, rank, b_offset, adapter.scale[0], 0)
    return ref.pack_table(entries, device)


def check(y, y0, x, ids, adapter) -> None:
    rows = ref.rows_of(ids, 1)
    delta = ref.lora_delta(x.cpu()[rows], adapter.a[0], adapter.b[0], adapter.scale[0])
    ref.assert_close("y", y.cpu()[rows], ref.add(y0.cpu()[rows], delta), delta.exact)
    rest = torch.tensor([i for i, g in enumerate(ids) if g != 1])
    ref.assert_same_bits("other rows", y.cpu()[rest], y0.cpu()[rest])


@pytest.mark.trap(14)
@pytest.mark.parametrize("k", [2048, 2043], ids=["aligned", "odd"])
def test_a_row_times_k_beyond_31_bits(device, path, k):
    adapter = make_adapter([64], k, (16,), GEN, torch.bfloat16)
    rows_a = -(-BIG // k)
    a = huge(device, rows_a * k).view(rows_a, k)
    a[-16:] = adapter.a[0].to(device)
    b = adapter.b[0].flatten().to(device)
    ids = [0, 1, -1, 1, 1] * 5
    x, y = randn((25, k), GEN, torch.bfloat16).to(device), randn((25, 64), GEN, torch.bfloat16).to(device)
    y0 = y.clone()
    plan = plan_rows(torch.tensor(ids, dtype=torch.int32, device=device), 2)
    ops.linear_(y, x, [a], [b], one_entry(adapter, rows_a - 16, 0, device), plan, [64], [0], 16)
    check(y, y0, x, ids, adapter)
    v = torch.zeros((25, 16), device=device)
    ops.shrink(v, x, [a], one_entry(adapter, rows_a - 16, 0, device), plan)
    want = x.cpu().double() @ adapter.a[0].double().T
    assert (v.cpu()[1].double() - want[1]).abs().max() < 1e-2


@pytest.mark.trap(14)
@pytest.mark.parametrize("odd", [0, 5], ids=["aligned", "odd"])
def test_b_offset_beyond_31_bits(device, path, odd):
    adapter = make_adapter([96], 128, (16,), GEN, torch.bfloat16)
    offset = BIG + odd
    b = huge(device, offset + 96 * 16)
    b[offset:] = adapter.b[0].flatten().to(device)
    ids = [1, -1, 0, 1, 1] * 5
    x, y = randn((25, 128), GEN, torch.bfloat16).to(device), randn((25, 96), GEN, torch.bfloat16).to(device)
    y0 = y.clone()
    plan = plan_rows(torch.tensor(ids, dtype=torch.int32, device=device), 2)
    ops.linear_(y, x, [adapter.a[0].to(device)], [b], one_entry(adapter, 0, offset, device), plan, [96], [0], 16)
    check(y, y0, x, ids, adapter)


@pytest.mark.trap(9, 14)
def test_row_strides_of_x_and_y_beyond_31_bits(device, path):
    """Five rows half a billion elements apart: the last one lies beyond 2^31."""
    adapter = make_adapter([64], 64, (8,), GEN, torch.bfloat16)
    pitch = 2**29 + 8
    rows = 5
    buffer = huge(device, (rows - 1) * pitch + 128)
    x, y = buffer.as_strided((rows, 64), (pitch, 1)), buffer.as_strided((rows, 64), (pitch, 1), 64)
    x.copy_(randn((rows, 64), GEN, torch.bfloat16))
    y.copy_(randn((rows, 64), GEN, torch.bfloat16))
    y0, ids = y.clone(), [1, 1, -1, 0, 1]
    plan = plan_rows(torch.tensor(ids, dtype=torch.int32, device=device), 2)
    b = adapter.b[0].flatten().to(device)
    ops.linear_(y, x, [adapter.a[0].to(device)], [b], one_entry(adapter, 0, 0, device), plan, [64], [0], 8)
    check(y, y0, x, ids, adapter)


@pytest.mark.trap(14)
@pytest.mark.parametrize("token_major", [False, True], ids=["rank_rows", "token_rows"])
def test_embedding_arena_beyond_31_bits(device, path, token_major):
    vocab, rank = 2**18, 8
    rows_a = BIG // (rank if token_major else vocab) + (vocab if token_major else rank)
    shape = (rows_a, rank) if token_major else (rows_a, vocab)
    a = huge(device, shape[0] * shape[1]).view(shape)
    adapter = make_adapter([64], 16, (rank,), GEN, torch.bfloat16)
    tokens = torch.tensor([0, 1, vocab - 1, 77777, vocab])
    table_rows = a[-vocab:].T if token_major else a[-rank:]  # [rank, vocab]
    values = (adapter.a[0][:, :4].float() * 4).to(torch.bfloat16)
    table_rows[:, tokens[:4].to(device)] = values.to(device)
    y = randn((5, 64), GEN, torch.bfloat16).to(device)
    y0 = y.clone()
    plan = plan_rows(torch.ones(5, dtype=torch.int32, device=device), 2)
    table = one_entry(adapter, rows_a - (vocab if token_major else rank), 0, device)
    ops.embedding_(
        y, tokens.to(device), [a], [adapter.b[0].flatten().to(device)], table, plan, [64], [0], vocab=vocab,
        token_major=token_major,
    )  # fmt: skip
    delta = ref.lookup_delta(torch.arange(4), values, adapter.b[0], adapter.scale[0])
    ref.assert_close("y", y.cpu()[:4], ref.add(y0.cpu()[:4], delta), delta.exact)
    ref.assert_same_bits("row of an unknown token", y[4], y0[4])


@pytest.mark.trap(14)
def test_expert_pool_beyond_31_bits(device, path):
    """8 slots x 512 experts of K 2688: the weights of the last expert of the last slot end the arena."""
    k, rank, slots, experts = 2688, 16, 8, 512
    adapter = make_adapter([32], k, (rank,), GEN, torch.bfloat16)
    case = make_moe_case(device, tokens=6, top_k=2, slots=slots, experts=experts, no_expert=0.0)
    case.topk_ids[:, 1], case.token_slots[::2] = experts - 1, slots - 1
    ops.moe_plan(case.plan, case.topk_ids, case.token_slots, slots, experts, None, None)
    rows_a = -(-BIG // k)
    a = huge(device, rows_a * k).view(rows_a, k)
    a[-rank:] = adapter.a[0].to(device)
    entries = np.zeros((slots * experts, 1), dtype=ref.ENTRY)
    entries[-1, 0] = (rows_a - rank, rank, 0, rank, 0, adapter.scale[0], 0)
    x, y = randn((6, k), GEN, torch.bfloat16).to(device), randn((12, 32), GEN, torch.bfloat16).to(device)
    y0 = y.clone()
    ops.moe_gate_up_(
        y, x, [a], [adapter.b[0].flatten().to(device)], ref.pack_table(entries, device), case.plan, [32], [0], rank, 2
    )
    slot = case.token_slots.tolist()
    ids = [
        1 if slot[p // 2] == slots - 1 and int(case.topk_ids[p // 2, p % 2]) == experts - 1 else -1 for p in range(12)
    ]
    assert 1 in ids
    check(y, y0, x.repeat_interleave(2, 0), ids, adapter)


@pytest.mark.trap(9, 14)
@pytest.mark.parametrize("width", [64, 33], ids=["aligned", "odd"])
def test_deltas_more_than_two_gigabytes_apart(device, path, width):
    """The pitch that one call of a runtime's memset takes ends there."""
    k, rows, pitch = 64, 3, 2**30 + 8
    adapter = make_adapter([width], k, (8,), GEN, torch.bfloat16)
    buffer = huge(device, (rows - 1) * pitch + width + 8)
    delta, beside = buffer.as_strided((rows, width), (pitch, 1)), buffer.as_strided((rows, 8), (pitch, 1), width)
    delta.fill_(torch.nan)
    beside.fill_(7.0)
    plan = ref.new_plan(rows, 2, device=device)
    ids = torch.tensor([[1], [1], [0]], dtype=torch.int32, device=device)
    ops.moe_plan(plan, ids, torch.zeros(rows, dtype=torch.int32, device=device), 1, 2)
    x, b = randn((rows, k), GEN, torch.bfloat16).to(device), adapter.b[0].flatten().to(device)
    ops.moe_delta(delta, x, [adapter.a[0].to(device)], [b], one_entry(adapter, 0, 0, device), plan, [width], 8)
    want = ref.lora_delta(x.cpu(), adapter.a[0], adapter.b[0], adapter.scale[0])
    ref.assert_close("delta", delta.cpu()[:2], want[:2], want.exact[:2])
    assert (delta[2] == 0).all() and (beside == 7.0).all()
