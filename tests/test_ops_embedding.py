"""embedding_: A looked up by token id, in both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
import torch
from cases import embedding_args, make_embedding_case, ops, plan_rows

LAYOUT = pytest.mark.parametrize("token_major", [False, True], ids=["rank_rows", "token_rows"])


def run_embedding(case) -> None:
    ops.embedding_(**embedding_args(case))
    case.check()


@pytest.mark.trap(14)
@LAYOUT
@pytest.mark.parametrize("rows", [0, 1, 7, 33, 300])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lookup_with_tokens_in_and_out_of_the_vocabulary(device, dtype, path, rows, token_dtype, token_major):
    run_embedding(
        make_embedding_case(device, dtype, rows=rows, token_dtype=token_dtype, token_major=token_major, seed=rows)
    )


@LAYOUT
def test_embedding_lora_in_segmented_batch(device, dtype, path, token_major):
    """Prefill: segments of several adapters and of none in one batch, the first adapter twice."""
    for ids in ("segments", "two_segments", "base_and_one", "none", "one", "invalid"):
        run_embedding(make_embedding_case(device, dtype, rows=120, ids=ids, token_major=token_major, tokens="valid"))


@LAYOUT
@pytest.mark.parametrize("n", [1, 8, 19, 80, 99, 512, 2049])
def test_any_embedding_width(device, dtype, path, n, token_major):
    run_embedding(make_embedding_case(device, dtype, widths=(n,), rows=20, token_major=token_major, seed=n))


@LAYOUT
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33, 128, 256])
def test_any_embedding_rank(device, dtype, path, rank, token_major):
    run_embedding(make_embedding_case(device, dtype, ranks=(rank,), rows=20, token_major=token_major, seed=rank))


@LAYOUT
@pytest.mark.parametrize("ranks", [(8, 16, 64), (1, 17, 33), (100, 256)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40, 150, 700])
def test_aligned_pools_take_the_fast_path(device, dtype, path, rows, ranks, token_major):
    for widths in ((8,), (72, 640), (2048,)):
        run_embedding(
            make_embedding_case(
                device, dtype, rows=rows, widths=widths, ranks=ranks, token_major=token_major, aligned=True, seed=rows
            )
        )


@LAYOUT
def test_several_slices(device, dtype, path, token_major):
    run_embedding(make_embedding_case(device, dtype, widths=(40, 17, 99), rows=40, token_major=token_major))


@LAYOUT
def test_all_tokens_out_of_the_vocabulary_leave_y_alone(device, dtype, path, token_major):
    case = make_embedding_case(device, dtype, rows=30, ids="one", token_major=token_major)
    case.token_ids.fill_(57)
    ops.embedding_(**embedding_args(case))
    case.y.assert_written_only("y", torch.zeros(case.y.view.shape, dtype=torch.bool))


@LAYOUT
def test_64_bit_token_ids_are_not_cut_to_32(device, dtype, path, token_major):
    """The low half of these ids is a valid token."""
    case = make_embedding_case(device, dtype, rows=30, ids="one", token_major=token_major)
    case.token_ids.copy_(torch.arange(30) + 2**32)
    ops.embedding_(**embedding_args(case))
    case.y.assert_written_only("y", torch.zeros(case.y.view.shape, dtype=torch.bool))


def test_bf16_minus_zero_base_and_same_token_many_times(device, path):
    """A decode batch in which every row asks for the same token of the same adapter: equal rows out."""
    case = make_embedding_case(device, torch.bfloat16, rows=40, ids="one", tokens="valid")
    case.token_ids.fill_(11)
    y = torch.full((40, case.y.view.shape[1]), -0.0, dtype=torch.bfloat16, device=device)
    ops.embedding_(**embedding_args(case) | {"y": y})
    ref.assert_same_bits("rows of one token", y, y[:1].expand(40, -1))
    assert y.float().abs().sum() > 0


@pytest.mark.parametrize("first", [0, 1], ids=["rank_1_first", "rank_1_last"])
def test_an_a_of_one_row_may_have_any_row_stride(device, dtype, path, first):
    """The others' stride is that of the call."""
    vocab, rows, ranks = 16, 5, [1, 8]
    gen = torch.Generator().manual_seed(7)
    a = [torch.randn((8, vocab), generator=gen).to(dtype).to(device)[:rank] for rank in ranks]
    a[0] = a[0].as_strided(a[0].shape, (3, 1))
    b = [torch.randn((8 * rank,), generator=gen).to(dtype).to(device) for rank in ranks]
    entries = np.zeros((1, 2), dtype=ref.ENTRY)
    entries[0] = [(0, rank, 0, rank, 0, 1.0, 0) for rank in ranks]
    if first == 1:
        a, b, entries = a[::-1], b[::-1], entries[:, ::-1].copy()
    tokens = torch.arange(rows, device=device)
    y = torch.zeros((rows, 16), dtype=dtype, device=device)
    plan = plan_rows(torch.zeros(rows, dtype=torch.int32, device=device), 1)
    ops.embedding_(y, tokens, a, b, ref.pack_table(entries, device), plan, [8, 8], [0, 8], vocab)
    for s in range(2):
        weights = b[s].view(8, -1).cpu()
        delta = ref.lookup_delta(tokens.cpu(), a[s].cpu(), weights, 1.0)
        ref.assert_close(f"slice {s}", y.cpu()[:, 8 * s : 8 * s + 8], delta, None)
