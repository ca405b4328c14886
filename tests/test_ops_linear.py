"""linear_, shrink and expand_: values, untouched bytes, layouts, shapes."""

from __future__ import annotations

import contextlib
import random

import pytest
import reference as ref
import torch
from cases import (
    LAYOUTS,
    UNEQUAL,
    Guarded,
    assert_lora_matters,
    make_adapter,
    make_dense_case,
    noise,
    ops,
    poisoned,
)


def run_linear(case, path=None) -> None:
    """In one op, and with the deltas made before."""
    ops.linear_(**case.linear_args())
    case.check()
    case.y.reset()
    add_apart(case)
    case.check("y with a delta")


def add_apart(case) -> torch.Tensor:
    """linear_delta, then add_delta_. Deltas of rows without an adapter are nobody's business, so they are made NaN."""
    args = case.linear_args()
    y, cols = args.pop("y"), args.pop("cols")
    blank = torch.full((case.rows, sum(case.widths)), torch.nan, dtype=y.dtype)
    delta = Guarded(blank, y.device.type, torch.Generator().manual_seed(8), left=8, right=8)
    ops.linear_delta(delta.view, **args)
    delta.assert_written_only("delta", torch.ones(blank.shape, dtype=torch.bool))
    active = torch.tensor([group >= 0 for group in case.row_group], dtype=torch.bool, device=y.device)
    if case.rows:
        delta.view[~active] = torch.nan
    ops.add_delta_(y, delta.view, args["table"], args["plan"], case.widths, cols)
    return delta.view


def ref_v(case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x A^T in float64 [rows, v_width], where shrink must write it, and the size of its fp32 roundings."""
    v = torch.full((case.rows, case.pools.v_width), torch.nan, dtype=torch.float64)
    size = torch.zeros_like(v)
    x = case.x.cpu()
    for g in ref.used_groups(case.row_group):
        at = ref.rows_of(case.row_group, g)
        for s in range(len(case.widths)):
            rank, col = case.adapters[g].rank(s), int(case.pools.entries[g, s]["v_col"])
            if rank:
                x64, a64 = x[at].double(), case.adapters[g].a[s].double()
                v[at, col : col + rank] = x64 @ a64.T
                size[at, col : col + rank] = ((x64**2) @ (a64**2).T).sqrt()
    return v, ~torch.isnan(v), size


def run_halves(case) -> None:
    """shrink against float64, then expand_ from the float64 v, both with NaN wherever they must not look."""
    device = case.y.view.device
    want, here, size = ref_v(case)
    gen = torch.Generator().manual_seed(7)
    before = noise((case.rows + 2, case.pools.v_width + 3), torch.float32, gen)
    buffer = before.to(device)
    v = buffer[1:-1, 1 : 1 + case.pools.v_width]
    ops.shrink(v, case.x, case.pools.a, case.pools.table, case.plan)
    kept = torch.ones(before.shape, dtype=torch.bool)
    kept[1:-1, 1 : 1 + case.pools.v_width] = ~here
    ref.assert_same_bits("v of absent slices and rows", buffer, before, kept)
    off = torch.where(here, v.cpu().double() - want, 0.0)
    bound = 2.0**-23 * case.x.shape[1] ** 0.5 * size.norm()  # fp32 sums: bf16 would be 2 ** 14 times as far off
    assert off.norm() <= bound, f"v off by {off.norm():.3e}, bound {bound:.3e}"

    given = torch.where(here, want.float(), torch.nan).to(device)
    wide = torch.full((case.rows, case.pools.v_width + 5), torch.nan, device=device)
    wide[:, 2:-3] = given
    ops.expand_(case.y.view, wide[:, 2:-3], case.pools.b, case.pools.table, case.plan, case.widths, case.cols)
    case.check()


# -------------------------------------------------------------------------------------------- values over everything


@pytest.mark.trap(1, 6, 8, 13, 27)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slices", range(1, 9))
def test_every_slice_count_with_mixed_ranks_in_poisoned_pools(device, dtype, path, slices, layout):
    run_linear(make_dense_case(device, dtype, widths=UNEQUAL[:slices], layout=layout, rows=33, seed=slices), path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_aligned_pools_take_the_fast_path(device, dtype, path, slices, layout):
    run_linear(
        make_dense_case(
            device, dtype, widths=(256, 64, 128, 64)[:slices], k=256, layout=layout, rows=33, aligned=True, seed=slices
        ),
        path,
    )


@pytest.mark.trap(29)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 17, 33, 64, 300, 1100])
@pytest.mark.parametrize("aligned", [False, True], ids=["odd", "aligned"])
def test_row_counts_from_none_to_prefill(device, dtype, path, rows, aligned):
    shape = {"k": 256, "widths": (256, 64, 64)} if aligned else {"k": 99, "widths": (111, 19, 19)}
    run_linear(make_dense_case(device, dtype, rows=rows, aligned=aligned, ids="mixed", **shape), path)


@pytest.mark.trap(7)
@pytest.mark.parametrize("rows, groups", [(400, 30), (700, 20), (1100, 20), (1300, 100)])
@pytest.mark.parametrize("ids", ["mixed", "skewed", "segments", "none"])
def test_short_and_long_runs_of_many_adapters(device, dtype, path, ids, rows, groups):
    """A step of prefill and decode: on CUDA its short runs may take other kernels than its long ones."""
    shape = {"k": 64, "widths": (72, 24), "aligned": True}
    run_linear(make_dense_case(device, dtype, rows=rows, groups=groups, ids=ids, seed=rows, **shape), path)


@pytest.mark.trap(7, 29)
@pytest.mark.parametrize("rows, groups", [(300, 1), (512, 4), (1024, 1), (1024, 4)])
@pytest.mark.parametrize("ids", ["segments", "mixed", "skewed"])
def test_prompts_of_few_adapters_of_low_rank(device, dtype, path, ids, rows, groups):
    """On CUDA, as many rows as decode's kernels take."""
    shape = {"k": 96, "widths": (136, 64), "ranks": (16, 4), "aligned": True, "absent": 0.1, "seed": rows}
    case = make_dense_case(device, dtype, rows=rows, groups=groups, ids=ids, **shape)
    assert rows * case.pools.v_width / len(case.widths) <= 16384
    run_linear(case, path)
    run_halves(make_dense_case(device, dtype, rows=rows, groups=groups, ids=ids, **shape))


@pytest.mark.trap(7)
@pytest.mark.parametrize("rows", [1, 7, 33, 300])
@pytest.mark.parametrize(
    "ids", ["mixed", "none", "one", "base_and_one", "segments", "two_segments", "invalid", "skewed"]
)
def test_mixes_of_base_and_adapter_rows(device, dtype, path, ids, rows):
    groups = 5 if rows > 1 else 2
    run_linear(
        make_dense_case(device, dtype, rows=rows, groups=groups, ids=ids, k=64, widths=(72, 24), seed=rows), path
    )


@pytest.mark.trap(6)
@pytest.mark.parametrize("k", [1, 7, 8, 19, 80, 99, 111, 512, 2049])
def test_any_input_width(device, dtype, path, k):
    run_linear(make_dense_case(device, dtype, k=k, widths=(80, 19), rows=17, seed=k), path)
    if k % 8 == 0:
        run_linear(make_dense_case(device, dtype, k=k, widths=(80, 24), rows=17, aligned=True, seed=k), path)


@pytest.mark.trap(6)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 19, 80, 99, 111, 512, 2049])
def test_any_output_width(device, dtype, path, n):
    run_linear(make_dense_case(device, dtype, k=80, widths=(n,), rows=17, seed=n), path)
    if n % 8 == 0:
        run_linear(make_dense_case(device, dtype, k=80, widths=(n, 8), rows=17, aligned=True, seed=n), path)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200, 255, 256])
def test_every_rank_alone(device, dtype, path, rank):
    run_linear(make_dense_case(device, dtype, ranks=(rank,), absent=0.0, widths=(99, 24), rows=19, seed=rank), path)


@pytest.mark.parametrize("aligned", [False, True], ids=["odd", "aligned"])
def test_ranks_from_0_to_256_in_one_batch(device, dtype, path, aligned):
    run_linear(
        make_dense_case(
            device, dtype, groups=24, rows=100, ranks=tuple(range(1, 257, 5)) + (256,), absent=0.3, aligned=aligned,
            k=128, widths=(128, 64, 64),
        ),
        path,
    )  # fmt: skip


@pytest.mark.parametrize(
    "k, widths",
    [(2560, (4096, 1024, 1024)), (4096, (1536, 576)), (2048, (2048, 2048, 32, 32)), (512, (512,))],
    ids=["gqa_qkv", "mla_q_a_kv_a", "gdn_in_proj", "small_hidden"],
)
def test_shapes_of_real_models(device, path, k, widths):
    run_linear(
        make_dense_case(device, torch.bfloat16, k=k, widths=widths, rows=24, ranks=(8, 16, 32, 64), aligned=True), path
    )


@pytest.mark.trap(30)
@pytest.mark.parametrize("widths", [(4096, 1024, 1024), (2048, 2048, 4096, 4096)], ids=["qkv", "qkvz"])
@pytest.mark.parametrize("sequences", [1, 5, 64])
def test_mean_squared_error_of_ragged_sequences_in_fp16(device, path, widths, sequences):
    """The bound the engines put on their own kernel: 1e-3 in fp16 at K 2560, ranks 8/16/32/0, outputs of size 1."""
    ids = [s % 5 - 1 for s in range(sequences) for _ in range(1 + (s * 7) % (6 if device == "cpu" else 200))]
    case = make_dense_case(
        device, torch.float16, k=2560, widths=widths, ids=ids, groups=4, ranks=(8, 16, 32), aligned=True
    )
    run_linear(case, path)
    for part in case.parts:
        got = case.y.view.cpu()[part.rows][:, part.cols].double()
        assert (got - part.want.exact).square().mean() < 1e-6


# -------------------------------------------------------------------------------------------- named risks


@pytest.mark.trap(1)
def test_two_slices_with_loaded_rank_below_slot_rank(device, dtype, path):
    """Fused q_a + kv_a of unequal widths, adapters of rank 1..63 in slots of rank 64: the second slice once was read
    at the offset of the loaded rank, and the poison behind it came out."""
    gen = torch.Generator().manual_seed(5)
    widths, k = (96, 40), 128
    for layout in LAYOUTS:
        adapters = [make_adapter(widths, k, (r, r), gen, dtype) for r in (1, 3, 8, 16, 32, 63)]
        case = make_dense_case(
            device, dtype, adapters=adapters, widths=widths, k=k, layout=layout, slot_rank=64, rows=40, ids="mixed"
        )
        run_linear(case, path)


@pytest.mark.trap(7)
def test_rows_of_no_adapter_anywhere_are_bit_identical(device, dtype, path):
    for hole in (0, 1, 15, 16, 17, 31, 32):
        ids = [1] * 33
        ids[hole] = -1
        run_linear(make_dense_case(device, dtype, ids=ids, groups=3, widths=(40, 24), k=64), path)


@pytest.mark.trap(7)
def test_one_adapter_in_two_far_apart_segments(device, dtype, path):
    run_linear(make_dense_case(device, dtype, rows=150, ids="two_segments", groups=6, widths=(64, 19), k=80), path)


@pytest.mark.trap(8)
def test_gqa_slices_of_unequal_width_with_only_q_and_v_trained(device, dtype, path):
    gen = torch.Generator().manual_seed(6)
    widths, k = (192, 48, 48), 96
    adapters = [
        make_adapter(widths, k, r, gen, dtype) for r in ((8, 0, 8), (0, 16, 0), (0, 0, 4), (4, 8, 32), (0, 0, 0))
    ]
    for layout in LAYOUTS:
        run_linear(make_dense_case(device, dtype, adapters=adapters, widths=widths, k=k, layout=layout, rows=40), path)


@pytest.mark.trap(9)
def test_slices_inside_a_wider_buffer_with_bits_around_them_kept(device, dtype, path):
    """y starts at any column of a wide buffer, slices stand in any order with gaps; all else is random bits."""
    for seed in range(4):
        run_linear(make_dense_case(device, dtype, rows=19, widths=(19, 80, 1), gaps=True, seed=seed), path)
        run_linear(
            make_dense_case(device, dtype, rows=19, widths=(24, 80, 8), gaps=True, aligned=True, seed=seed), path
        )


@pytest.mark.trap(13)
def test_nan_in_rows_slots_and_padding_does_not_leak(device, dtype, path):
    """x of base rows is NaN, unused slots and the padding of used ones are NaN or huge, v scratch is what was there."""
    case = make_dense_case(
        device, dtype, rows=64, groups=12, ids=[1, -1, 3, -1] * 16, ranks=(1, 3, 7, 16), slot_rank=32
    )
    assert torch.isnan(case.x).any() and torch.isnan(case.pools.a[0].float()).any()
    run_linear(case, path)


def test_shared_a_is_one_entry_of_v(device, dtype, path):
    for layout in ("slots", "packed", "ragged"):
        case = make_dense_case(device, dtype, shared_a=1.0, absent=0.3, layout=layout, widths=(64, 19, 40, 7), rows=40)
        shared = [e for e in case.pools.entries.reshape(-1, 4) if len({int(c) for c in e["v_col"][e["rank"] > 0]}) == 1]
        assert shared
        run_linear(case, path)


def test_inf_and_nan_of_a_row_stay_in_that_row(device, dtype, path):
    gen = torch.Generator().manual_seed(3)
    x = torch.randn((20, 64), generator=gen).to(dtype)
    x[3, 5], x[7, 0], x[11, 63] = torch.inf, torch.nan, -torch.inf
    run_linear(make_dense_case(device, dtype, x=x, ids=[i % 3 for i in range(20)], groups=3, k=64, absent=0.0), path)


def test_non_finite_base_outputs_stay(device, dtype, path):
    def base(y):
        y[..., 0], y[..., 1] = torch.inf, torch.nan
        y[..., 2] = torch.finfo(y.dtype).max
        return y

    run_linear(make_dense_case(device, dtype, base=base, rows=20, widths=(64, 40), absent=0.0), path)


def test_large_base_output_is_rounded_once(device, dtype, path):
    """y of a hundred times the delta: rounding the delta first, or y twice, still fits; losing the delta does not."""
    run_linear(make_dense_case(device, dtype, base=lambda y: y * 4, rows=40, ranks=(16, 32, 64), absent=0.0), path)


def test_zero_scale_and_negative_scale(device, dtype, path):
    gen = torch.Generator().manual_seed(8)
    adapters = [make_adapter((64, 40), 80, (8, 16), gen, dtype) for _ in range(3)]
    adapters[0].scale, adapters[1].scale, adapters[2].scale = [0.0, -1.5], [-0.25, 3.0], [0.25, 64.0]
    run_linear(make_dense_case(device, dtype, adapters=adapters, widths=(64, 40), k=80, rows=40), path)


def test_zero_groups_and_zero_rows_do_nothing(device, dtype):
    empty = torch.empty((0, 3, 8), dtype=torch.int32, device=device)
    case = make_dense_case(device, dtype, ids=[-1] * 9, groups=2)
    plan = ref.new_plan(9, 0, device=device)
    ops.plan(plan, case.group_ids, 0)
    args = case.linear_args() | {"table": empty, "plan": plan}
    ops.linear_(**args)
    case.check()
    case = make_dense_case(device, dtype, rows=0)
    run_linear(case)


@pytest.mark.trap(4)
@pytest.mark.parametrize("more", [0, 37, 4096, 20000])
@pytest.mark.parametrize("aligned", [False, True], ids=["odd", "aligned"])
def test_v_width_above_what_the_table_uses(device, dtype, path, more, aligned):
    """The capacity of a pool, not what is loaded: more than any shared memory holds is no error."""
    case = make_dense_case(device, dtype, aligned=aligned, widths=(64, 24), k=64)
    args = case.linear_args()
    args["v_width"] += more
    ops.linear_(**args)
    case.check()


@pytest.mark.parametrize("ids", ["mixed", "segments"])
@pytest.mark.parametrize("rank", [16, 256])
def test_many_outputs_of_many_tiles(device, dtype, path, ids, rank):
    shape = {"k": 64, "widths": (8192, 40), "ranks": (rank,), "aligned": True}
    run_linear(make_dense_case(device, dtype, rows=300, groups=20, ids=ids, **shape), path)


@pytest.mark.trap(4, 7)
@pytest.mark.parametrize("ids, groups", [("segments", 4), ("mixed", 4), ("skewed", 32)])
@pytest.mark.parametrize("widths, rank", [((3200,), 100), ((72, 136), 100), ((72, 136), 16)])
def test_prefill_whose_k_many_blocks_share(device, dtype, path, ids, groups, widths, rank):
    """On CUDA, of mma: three planes of v and more; of many outputs at rank 100 that is the first choice."""
    shape = {"k": 1024, "widths": widths, "ranks": (rank, 16), "aligned": True, "absent": 0.1}
    run_linear(make_dense_case(device, dtype, rows=600, groups=groups, ids=ids, **shape), path)


@pytest.mark.trap(4, 7)
@pytest.mark.parametrize("lengths", [[8500], [1215] * 7, [750] * 12, [7180] + [130] * 14],
                         ids=["67 tiles", "70 of 72", "72 of 77", "85 of 77"])  # fmt: skip
@pytest.mark.parametrize("rank", [16, 100])
def test_prefill_of_more_tiles_than_clusters(device, dtype, path, lengths, rank):
    """On CUDA, of wide, how many tiles there are of those expected: what 66 clusters of two leave over has a launch
    beside them."""
    ids = [group for group, rows in enumerate(lengths) for _ in range(rows)]
    shape = {"k": 1056, "widths": (72, 40), "ranks": (rank, 8), "aligned": True, "absent": 0.1}
    run_linear(make_dense_case(device, dtype, groups=len(lengths), ids=ids, **shape), path)


@pytest.mark.trap(4)
def test_eight_slices_of_rank_256(device, dtype, path):
    run_linear(
        make_dense_case(device, dtype, ranks=(256,), widths=(64,) * 8, k=64, rows=40, absent=0.0, aligned=True), path
    )


@pytest.mark.trap(11)
def test_adapters_of_one_table_change_between_calls(device, dtype, path):
    """A slot reloaded: the same table tensor, the same arenas, new content."""
    shape = {"ranks": (8, 16), "slot_rank": 16, "k": 80, "widths": (64, 40), "aligned": True}
    first, second = (make_dense_case(device, dtype, seed=seed, **shape) for seed in (1, 2))
    run_linear(first, path)
    mine = [*first.pools.a, *first.pools.b, first.pools.table]
    for old, new in zip(mine, [*second.pools.a, *second.pools.b, second.pools.table], strict=True):
        old.copy_(new)
    ops.linear_(**second.linear_args() | first.pools.args())
    second.check()


@pytest.mark.trap(11)
def test_recycled_allocation_with_other_strides(device, dtype, path):
    """The same address with another row stride and another K in the next call."""
    storage_a = torch.empty(64 * 400, dtype=dtype, device=device)
    storage_x = torch.empty(64 * 400, dtype=dtype, device=device)
    for seed, k in enumerate((80, 64, 99, 128, 80)):
        case = make_dense_case(device, dtype, k=k, ranks=(4, 8), groups=2, widths=(64,), rows=20, gaps=False, seed=seed)
        a, x = case.pools.a[0], case.x
        pitch = k + 8 * (seed % 3)
        case.pools.a[0] = storage_a.as_strided(a.shape, (pitch, 1)).copy_(a)
        case.x = storage_x.as_strided(x.shape, (pitch + 8, 1)).copy_(x)
        run_linear(case, path)


@pytest.mark.trap(27)
def test_the_checks_refuse_a_bypassed_lora(device, dtype):
    case = make_dense_case(device, dtype, rows=40)
    assert_lora_matters(case.parts)
    with pytest.raises(AssertionError, match="above the bound"):
        case.check()


@pytest.mark.trap(27)
def test_the_checks_refuse_a_neighbours_adapter(device, dtype):
    case = make_dense_case(device, dtype, ids=[0, 1] * 20, groups=3, absent=0.0)
    wrong = torch.tensor([1, 2] * 20, dtype=torch.int32, device=device)
    ops.plan(case.plan, wrong, 3)
    ops.linear_(**case.linear_args())
    with pytest.raises(AssertionError, match="above the bound"):
        case.check()


# -------------------------------------------------------------------------------------------- the two halves


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slices", [1, 2, 3, 8])
def test_shrink_then_expand(device, dtype, path, slices, layout):
    run_halves(make_dense_case(device, dtype, widths=UNEQUAL[:slices], layout=layout, rows=33, seed=slices))


@pytest.mark.parametrize("rows", [0, 1, 7, 33, 300])
@pytest.mark.parametrize("ids", ["mixed", "none", "two_segments", "invalid"])
def test_shrink_then_expand_over_row_counts(device, dtype, path, rows, ids):
    run_halves(
        make_dense_case(device, dtype, rows=rows, ids=ids, aligned=rows % 2 == 0, k=64, widths=(64, 24), groups=4)
    )


def test_expand_adds_what_a_row_parallel_reduction_of_v_gives(device, dtype, path):
    """K cut in two as tensor parallelism does it: the sum of the two shrinks, expanded once."""
    case = make_dense_case(device, dtype, k=160, widths=(64, 40), rows=33, absent=0.0)
    v = torch.zeros((33, case.pools.v_width), device=device)
    for part in (slice(0, 72), slice(72, 160)):
        piece = torch.zeros_like(v)
        ops.shrink(piece, case.x[:, part], [a[:, part] for a in case.pools.a], case.pools.table, case.plan)
        v += piece
    ops.expand_(case.y.view, v, case.pools.b, case.pools.table, case.plan, case.widths, case.cols)
    case.check()


def test_linear_equals_shrink_then_expand_within_the_bound_on_one_slice_of_the_table(device, dtype, path):
    """lm_head: linear_ on the logits rows alone, a plan of its own."""
    case = make_dense_case(device, dtype, k=96, widths=(1031,), rows=5, ids=[2, -1, 0, 2, 1], groups=3)
    run_linear(case, path)


@pytest.mark.parametrize("widths", [(4, 4), (12,), (1,), (8, 4), (64, 20)])
def test_deltas_of_narrow_slices_behind_aligned_inputs(device, dtype, path, widths):
    """Gated DeltaNet's in_proj_ba under tensor parallelism: x and A fit the fast kernels, the outputs do not."""
    case = make_dense_case(device, dtype, rows=9, k=64, widths=widths, gaps=False, aligned=True, ranks=(8, 16))
    case.x = case.x.clone()
    assert case.x.data_ptr() % 16 == 0 and case.x.stride() == (64, 1)
    assert all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in case.pools.a)
    run_linear(case, path)


def test_deltas_at_odd_addresses(device, dtype, path):
    case = make_dense_case(device, dtype, rows=9, k=64, widths=(64, 32), gaps=False, aligned=True)
    args = {name: value for name, value in case.linear_args().items() if name not in ("y", "cols")}
    wide = torch.full((9, 99), torch.nan, dtype=dtype, device=device)
    ops.linear_delta(wide[:, 1:97], **args)
    ops.add_delta_(case.y.view, wide[:, 1:97], args["table"], args["plan"], case.widths, case.cols)
    case.check()
    assert wide[:, [0, 97, 98]].isnan().all(), "nothing beside them is written"


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("aligned", [False, True], ids=["odd", "aligned"])
def test_deltas_are_what_linear_adds_to_minus_zero(device, dtype, path, rows, aligned):
    """And an absent slice is -0 in them, so that y keeps its bits there."""
    shape = {"k": 128, "widths": (256, 64, 64)} if aligned else {"k": 51, "widths": (41, 7, 9)}
    case = make_dense_case(device, dtype, rows=rows, aligned=aligned, absent=0.5, **shape)
    delta = add_apart(case)
    nothing = torch.full((rows, sum(case.widths)), -0.0, dtype=dtype, device=device)
    packed = [sum(case.widths[:s]) for s in range(len(case.widths))]
    ops.linear_(**case.linear_args() | {"y": nothing, "cols": packed})
    for g in ref.used_groups(case.row_group):
        at = ref.rows_of(case.row_group, g)
        for s, width in enumerate(case.widths):
            got, want = (t[at.to(device), packed[s] : packed[s] + width].cpu() for t in (delta, nothing))
            if case.adapters[g].rank(s) == 0:
                ref.assert_same_bits(f"group {g} slice {s}, absent", got, torch.full_like(got, -0.0))
            assert (got.double() - want.double()).norm() <= 2.0**-7 * want.double().norm()


def test_a_delta_of_another_plan_adds_nothing(device, dtype, path):
    """A plan made for fewer rows fits no call of more: the CPU refuses it, a device finds no row with an adapter."""
    case = make_dense_case(device, dtype, rows=33, gaps=False)
    y, delta = torch.ones((33, 210), dtype=dtype, device=device), torch.ones((33, 210), dtype=dtype, device=device)
    other = torch.zeros_like(case.plan)
    with pytest.raises(RuntimeError, match="plan must be") if device == "cpu" else contextlib.nullcontext():
        ops.add_delta_(y, delta, case.pools.table, other, case.widths, [0, 111, 130])
    assert (y == 1).all()


def test_poison_helper_holds_nan_and_large_values():
    sample = poisoned((100, 100), torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert 0.4 < torch.isnan(sample).float().mean() < 0.6 and sample.nan_to_num().abs().max() > 100


@pytest.mark.parametrize("adapters", [256, 300])
@pytest.mark.parametrize("aligned", [False, True], ids=["odd", "aligned"])
def test_hundreds_of_adapters_each_row_its_own(device, dtype, path, adapters, aligned):
    ids = random.Random(adapters).sample(range(adapters), adapters)
    shape = {"k": 64, "widths": (48, 16)} if aligned else {"k": 51, "widths": (41, 7)}
    ranks = (4, 8, 16, 32)
    run_linear(make_dense_case(device, dtype, ids=ids, groups=adapters, ranks=ranks, aligned=aligned, **shape), path)
