"""The adapter pool: what is loaded comes out, what is unloaded is gone, and nothing is ever half done."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from polylora import pool as pool_module
from polylora.adapters.weights import AdapterWeights, Entry, SiteWeights
from polylora.models.base import ModelTable, Site, Slice
from polylora.pool import AdapterPool, PoolError, PoolFrozen, PoolFull, SlotInUse, UnknownAdapter
from polylora.table import SliceTable
from table_reference import apply_table_linear, assert_matches, poison_unread
from torch import Tensor

H, VOCAB, EXPERTS = 20, 33, 3


def make_sites() -> dict[str, Site]:
    def site(path, kind, k, widths, **kwargs):
        slices = tuple(Slice(f"s{i}", w) for i, w in enumerate(widths))
        return Site(path=path, kind=kind, k=k, slices=slices, sources=(), **kwargs)

    sites = [
        site("embed", "embedding", VOCAB, [H]),
        site("qkv", "linear", H, [12, 5, 5]),
        site("o", "linear", 12, [H]),
        site("gate_up", "moe_gate_up", H, [7, 7], experts=EXPERTS, gated=True),
        site("gate_up_mixed", "moe_gate_up", H, [7, 7], experts=EXPERTS, gated=True, interleaved=True),
        site("down", "moe_down", 7, [H], experts=EXPERTS),
    ]
    return {s.path: s for s in sites}


SITES = make_sites()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def site_weights(site: Site, ranks: list[list[int]], scale: float, dtype: torch.dtype, shared: bool) -> SiteWeights:
    """``ranks[e][s]``, 0: absent. ``shared``: one A for all slices of an expert that have one rank."""
    out = SiteWeights()
    for row in ranks:
        entries: list[Entry | None] = []
        first: dict[int, int] = {}
        for s, rank in zip(site.slices, row, strict=True):
            if rank == 0:
                entries.append(None)
                continue
            if not (shared and rank in first):
                first[rank] = len(out.a)
                out.a.append(randn(rank, site.k, dtype=dtype))
            entries.append(Entry(first[rank], randn(s.width, rank, dtype=dtype), scale))
        out.entries.append(entries)
    return out


def make_adapter(
    name: str,
    rank: int = 4,
    seed: int = 0,
    sites: list[str] | None = None,
    scale: float = 0.5,
    dtype: torch.dtype = torch.float32,
    shared: bool = False,
) -> AdapterWeights:
    torch.manual_seed(seed)
    out = {}
    for path in sites or list(SITES):
        site = SITES[path]
        ranks = [[rank] * len(site.slices) for _ in range(max(site.experts, 1))]
        out[path] = site_weights(site, ranks, scale, dtype, shared)
    return AdapterWeights(name, out)


def make_pool(**kwargs) -> AdapterPool:
    return AdapterPool(SITES, **{"dtype": torch.float32, "max_adapters": 4, "max_rank": 16, **kwargs})


def apply(pool: AdapterPool, path: str, x: Tensor, groups: list[int]) -> Tensor:
    table, site = pool.site(path), SITES[path]
    return apply_table_linear(
        x,
        groups,
        table.table,
        table.a,
        table.b,
        table.widths,
        table.cols,
        v_width=table.v_width,
        y_width=site.width,
        col_stride=table.col_stride,
    )


def want(pool: AdapterPool, adapters: list[AdapterWeights], path: str, x: Tensor, groups: list[int]) -> Tensor:
    """Dense gather, from the adapters as they were given (in the pool's dtype)."""
    site = SITES[path]
    by_slot = {pool.slot(ad.name): ad for ad in adapters if ad.name in pool}
    y = torch.zeros(len(groups), site.width, dtype=torch.float64)
    experts = max(site.experts, 1)
    for row, group in enumerate(groups):
        adapter = by_slot.get(group // experts) if group >= 0 else None
        if adapter is None or path not in adapter.sites:
            continue
        weights = adapter.sites[path]
        at = 0
        for s, entry in enumerate(weights.entries[group % experts]):
            width = site.slices[s].width
            cols = slice(s, s + 2 * width - 1, 2) if site.interleaved else slice(at, at + width)
            at += width
            if entry is None:
                continue
            a, b = (t.to(pool.dtype).double() for t in (weights.a[entry.a], entry.b))
            v = a[:, int(x[row])] if site.kind == "embedding" else a @ x[row].double()
            y[row, cols] += torch.tensor(entry.scale, dtype=torch.float32).double() * (b @ v)
    return y


def check(pool: AdapterPool, adapters: list[AdapterWeights], poison: bool = True) -> None:
    """Every site and group of the pool gives the delta of the adapter that is there."""
    saved = [arena.tensor.clone() for arena in arenas(pool)]
    if poison:
        poison_all(pool)
    for path, site in SITES.items():
        groups = [-1, *range(pool.max_adapters * max(site.experts, 1)), 0]
        rows = len(groups)
        x = torch.arange(rows) % VOCAB if site.kind == "embedding" else randn(rows, site.k)
        expected = want(pool, adapters, path, x, groups)
        got = apply(pool, path, x, groups)
        if expected.any():
            assert_matches(got, expected)
        else:
            assert not got.any()
    for arena, before in zip(arenas(pool), saved, strict=True):
        arena.tensor.copy_(before)


def arenas(pool: AdapterPool) -> list:
    return [*pool._a.values(), pool._b]


def poison_all(pool: AdapterPool) -> None:
    """NaN wherever no entry of any site points."""
    kept = [torch.zeros(arena.tensor.shape, dtype=torch.bool) for arena in arenas(pool)]
    for path in SITES:
        table = pool.site(path)
        marks_a, marks_b = [torch.zeros_like(table.a[0])], [torch.zeros_like(table.b[0])]
        poison_unread(table.table, marks_a, marks_b, table.widths)
        for arena, mark in zip(arenas(pool), kept, strict=True):
            for tensor, marks in ((table.a[0], marks_a[0]), (table.b[0], marks_b[0])):
                if arena.tensor is tensor:
                    mark |= ~marks.isnan()
    for arena, mark in zip(arenas(pool), kept, strict=True):
        arena.tensor.masked_fill_(~mark, torch.nan)


def snapshot(pool: AdapterPool) -> list[Tensor]:
    return [pool.site(path).table.clone() for path in SITES] + [arena.tensor.clone() for arena in arenas(pool)]


def assert_same(before: list[Tensor], after: list[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        new_part = new[: old.size(0)]  # an arena may have grown
        assert torch.equal(old, new_part)
        assert not new[old.size(0) :].any()


def assert_empty(pool: AdapterPool) -> None:
    for path in SITES:
        assert not pool.site(path).table.any()
        assert not pool.site(path).words().any()
    for arena in arenas(pool):
        assert not arena.tensor.any(), f"weights are left in {arena.what}"
        stats = arena.ranges.stats()
        assert (stats["used"], stats["allocations"], stats["free_ranges"]) == (0, 0, 1)


# ---------------------------------------------------------------------------------------------------------------
# What comes out


def test_adapters_of_mixed_ranks():
    pool = make_pool()
    adapters = [make_adapter(f"r{r}", rank=r, seed=r) for r in (1, 4, 16, 7)]
    assert [pool.load(ad) for ad in adapters] == [0, 1, 2, 3]
    check(pool, adapters)


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_rounding_to_nearest(held: torch.dtype, given: torch.dtype):
    pool = make_pool(dtype=held)
    adapters = [make_adapter("a", rank=5, dtype=given)]
    pool.load(adapters[0])
    check(pool, adapters)


def test_partial_adapters():
    """k alone; up alone; one expert alone; one site alone."""
    torch.manual_seed(0)
    pool = make_pool()
    adapters = []
    for name, path, ranks in [
        ("k", "qkv", [[0, 4, 0]]),
        ("up", "gate_up", [[0, 2]] * EXPERTS),
        ("expert", "gate_up_mixed", [[0, 0], [3, 5], [0, 0]]),
        ("down", "down", [[1], [0], [16]]),
    ]:
        adapters.append(AdapterWeights(name, {path: site_weights(SITES[path], ranks, 2.0, torch.float32, False)}))
        pool.load(adapters[-1])
    check(pool, adapters)


def test_two_slices_loaded_rank_below_slot_rank():
    pool = make_pool(max_rank=64)
    adapters = [make_adapter("large", rank=64, sites=["gate_up", "qkv"]), make_adapter("small", rank=3, seed=1)]
    for adapter in adapters:
        pool.load(adapter)
    check(pool, adapters)


def test_slices_of_different_rank_and_scale():
    torch.manual_seed(0)
    weights = site_weights(SITES["qkv"], [[16, 3, 8]], 1.0, torch.float32, False)
    weights.entries[0][1] = Entry(1, weights.entries[0][1].b, -3.0)
    adapter = AdapterWeights("x", {"qkv": weights})
    pool = make_pool()
    pool.load(adapter)
    check(pool, [adapter])


def test_a_shared_by_slices_is_stored_and_shrunk_once():
    pool, apart = make_pool(), make_pool()
    adapter = make_adapter("x", rank=8, shared=True)
    pool.load(adapter)
    apart.load(make_adapter("x", rank=8))
    check(pool, [adapter])
    assert pool.site("qkv").v_width == 8
    assert apart.site("qkv").v_width == 24
    assert pool.stats()["a"][H]["used"] == 8 + 2 * EXPERTS * 8
    assert apart.stats()["a"][H]["used"] == 24 + 2 * EXPERTS * 16
    assert len(set(pool.site("qkv").words()[0, :, 2].tolist())) == 1


def test_shared_outer_moe_is_stored_once():
    """One A for gate and up of all experts, one B for down of all experts."""
    torch.manual_seed(0)
    gate_up = SiteWeights([randn(4, H)], [[Entry(0, randn(7, 4), 1.0) for _ in range(2)] for _ in range(EXPERTS)])
    b = randn(1, H, 4).expand(EXPERTS, -1, -1)
    down = SiteWeights([randn(4, 7) for _ in range(EXPERTS)], [[Entry(e, b[e], 1.0)] for e in range(EXPERTS)])
    adapter = AdapterWeights("tinker", {"gate_up": gate_up, "down": down})
    pool = make_pool()
    pool.load(adapter)
    check(pool, [adapter])
    assert pool.stats()["a"][H]["used"] == 4
    assert pool.stats()["a"][7]["used"] == 4 * EXPERTS
    assert pool.stats()["b"]["used"] == EXPERTS * 2 * 7 * 8 + H * 8


def test_any_source_strides():
    """Transposed storage, and PEFT's rank-major B of experts ([out, rank, E])."""
    torch.manual_seed(0)
    rank = 5
    whole_b = randn(H, rank, EXPERTS)
    down = SiteWeights(
        [randn(7, rank).t() for _ in range(EXPERTS)], [[Entry(e, whole_b[:, :, e], 0.5)] for e in range(EXPERTS)]
    )
    adapter = AdapterWeights("peft", {"down": down})
    for dtype in (torch.float32, torch.bfloat16):
        pool = make_pool(dtype=dtype)
        pool.load(adapter)
        check(pool, [adapter])


def test_alignment_of_the_fast_path():
    pool = make_pool(dtype=torch.bfloat16)
    for i, rank in enumerate((3, 7, 1, 13)):
        pool.load(make_adapter(f"a{i}", rank=rank))
    for path in SITES:
        table = pool.site(path)
        words = table.words()
        live = words[..., 1] > 0
        assert (words[..., 3][live] % 8 == 0).all(), "b_stride"
        assert (words[..., 4:6].copy().view("int64")[..., 0][live] % 8 == 0).all(), "b_offset"
        assert (words[..., 2][live] % 8 == 0).all(), "v_col"
        assert table.v_width % 8 == 0
        assert table.a[0].data_ptr() % 16 == 0 and table.b[0].data_ptr() % 16 == 0


def test_a_pool_made_and_grown_in_inference_mode_takes_adapters_outside_it():
    with torch.inference_mode():
        pool = make_pool()
        pool.load(make_adapter("first", rank=16))
    pool.load(make_adapter("second", rank=3))
    pool.unload("first")
    pool.load(make_adapter("first", rank=5))
    assert pool.names == ["first", "second"]


def test_the_site_object_is_what_ops_take():
    pool = AdapterPool(ModelTable("toy", SITES), max_adapters=2)
    table = pool.site("gate_up_mixed")
    assert isinstance(table, SliceTable)
    assert (table.widths, table.cols, table.col_stride) == ([7, 7], [0, 1], 2)
    assert table.table.shape == (2 * EXPERTS, 2, 8) and table.table.dtype == torch.int32
    assert table.a[0].shape[1] == H and table.a[0].dtype == torch.bfloat16
    assert table.b[0].dim() == 1
    assert pool.site("embed").vocab == VOCAB and pool.site("qkv").vocab == 0
    assert pool.site("qkv") is pool.site("qkv")
    with pytest.raises(KeyError, match="must be a site of the model, got 'kqv'"):
        pool.site("kqv")


# ---------------------------------------------------------------------------------------------------------------
# Slots


def test_slots_names_and_the_base_model():
    pool = make_pool()
    assert pool.slot(None) == -1, "the base model takes no slot"
    a, b, c = (make_adapter(n, seed=i) for i, n in enumerate("abc"))
    for adapter in (a, b, c):
        pool.load(adapter)
    assert pool.names == ["a", "b", "c"] and len(pool) == 3 and "b" in pool and "z" not in pool
    pool.unload("b")
    assert pool.names == ["a", "c"] and pool.slot("c") == 2
    d = make_adapter("d", rank=9, seed=5)
    assert pool.load(d) == 1, "the lowest free slot"
    check(pool, [a, c, d])
    with pytest.raises(UnknownAdapter, match=r"slot: name must be one of \['a', 'c', 'd'\], got 'b'"):
        pool.slot("b")


def test_one_adapter_too_many():
    pool = make_pool(max_adapters=2)
    adapters = [make_adapter("a"), make_adapter("b", seed=1)]
    for adapter in adapters:
        pool.load(adapter)
    before = snapshot(pool)
    with pytest.raises(PoolFull, match="all 2 slots are taken"):
        pool.load(make_adapter("c"))
    assert_same(before, snapshot(pool))
    check(pool, adapters)
    pool.unload("a")
    assert pool.load(make_adapter("c")) == 0


def test_a_name_can_be_loaded_once():
    pool = make_pool()
    pool.load(make_adapter("a"))
    with pytest.raises(ValueError, match="name must be one that is not loaded, got 'a', which has slot 0"):
        pool.load(make_adapter("a", rank=8))
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name must be a string"):
            pool.load(make_adapter(name))


def test_a_slot_in_use_is_not_unloaded():
    pool = make_pool()
    pool.load(make_adapter("a"))
    pool.load(make_adapter("b"))
    assert pool.acquire(["b", None, "a", "b"]) == [1, -1, 0, 1]
    assert pool.stats()["adapters"]["b"]["pins"] == 2
    with pytest.raises(SlotInUse, match="'b' must be released first, 2 acquired"):
        pool.unload("b")
    pool.release(["b", None])
    with pytest.raises(SlotInUse):
        pool.unload("b")
    pool.release(["a", "b"])
    pool.unload("b")
    with pool.acquired(["a"]) as slots:
        assert slots == [0]
        with pytest.raises(SlotInUse):
            pool.unload("a")
    pool.unload("a")
    assert_empty(pool)


def test_acquire_and_release_are_all_or_nothing():
    pool = make_pool()
    pool.load(make_adapter("a"))
    with pytest.raises(UnknownAdapter, match="'missing'"):
        pool.acquire(["a", "missing"])
    assert pool.stats()["adapters"]["a"]["pins"] == 0
    pool.acquire(["a"])
    with pytest.raises(ValueError, match=r"at most as often as acquired \(1\), got 2"):
        pool.release(["a", "a"])
    assert pool.stats()["adapters"]["a"]["pins"] == 1
    with pytest.raises(UnknownAdapter):
        pool.release(["a", "missing"])
    assert pool.stats()["adapters"]["a"]["pins"] == 1


def test_errors_share_a_base():
    assert all(issubclass(e, PoolError) for e in (PoolFull, PoolFrozen, SlotInUse, UnknownAdapter))


# ---------------------------------------------------------------------------------------------------------------
# Unloading


def test_unload_leaves_zeros():
    pool = make_pool()
    pool.load(make_adapter("secret", rank=13))
    assert all(arena.tensor.any() for arena in arenas(pool))
    pool.unload("secret")
    assert_empty(pool)


def test_unload_leaves_the_others_alone():
    pool = make_pool()
    adapters = [make_adapter(f"a{i}", rank=3 + i, seed=i) for i in range(4)]
    for adapter in adapters:
        pool.load(adapter)
    for name in ("a1", "a3", "a0"):
        pool.unload(name)
        check(pool, adapters)


def test_entries_go_before_the_weights(monkeypatch: pytest.MonkeyPatch):
    """A kernel between the two steps must find rank 0, never a rank over zeroed or foreign memory."""
    pool = make_pool()
    pool.load(make_adapter("a"))
    wiped = AdapterPool._free

    def free(self, blocks, **kwargs):
        assert not any(self.site(path).table.any() for path in SITES)
        wiped(self, blocks, **kwargs)

    monkeypatch.setattr(AdapterPool, "_free", free)
    pool.unload("a")
    assert_empty(pool)


# ---------------------------------------------------------------------------------------------------------------
# All or nothing


@contextlib.contextmanager
def fails_at(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int) -> Iterator[None]:
    """The ``call``-th call of ``owner.method`` does its work and then raises."""
    original = getattr(owner, method)
    count = 0

    def broken(self, *args, **kwargs):
        nonlocal count
        result = original(self, *args, **kwargs)
        count += 1
        if count == call:
            raise MemoryError("injected")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, broken)
        yield


@pytest.mark.parametrize("call", range(1, len(SITES) + 1))
@pytest.mark.parametrize("method", ["_write_weights", "_write_entries", "_raise_v_width"])
def test_injected_failure_mid_load(monkeypatch: pytest.MonkeyPatch, method: str, call: int):
    pool = make_pool()
    kept = make_adapter("kept", seed=1)
    pool.load(kept)
    before, stats = snapshot(pool), pool.stats()
    with fails_at(monkeypatch, AdapterPool, method, call), pytest.raises(MemoryError, match="injected"):
        pool.load(make_adapter("new", rank=16))
    assert_same(before, snapshot(pool))
    assert pool.names == ["kept"] and pool.stats()["free_slots"] == stats["free_slots"]
    assert {k: s["used"] for k, s in pool.stats()["a"].items()} == {k: s["used"] for k, s in stats["a"].items()}
    check(pool, [kept])
    again = make_adapter("new", rank=16)
    assert pool.load(again) == 1
    check(pool, [kept, again])


@pytest.mark.parametrize("call", range(1, 4))
def test_injected_failure_while_growing(monkeypatch: pytest.MonkeyPatch, call: int):
    pool = make_pool()
    kept = make_adapter("kept", seed=1)
    pool.load(kept)
    before = snapshot(pool)
    with fails_at(monkeypatch, pool_module._Arena, "grow", call), pytest.raises(MemoryError):
        pool.load(make_adapter("new", rank=16))
    assert_same(before, snapshot(pool))
    for path, site in SITES.items():
        assert pool.site(path).a[0] is pool._a[site.k].tensor and pool.site(path).b[0] is pool._b.tensor
    check(pool, [kept])
    new = make_adapter("new", rank=16)
    pool.load(new)
    check(pool, [kept, new])


def broken_adapters() -> list[tuple[str, AdapterWeights]]:
    def changed(path: str, change) -> AdapterWeights:
        adapter = make_adapter("bad")
        change(adapter.sites[path])
        return adapter

    def set_entry(e: int, s: int, **fields):
        def change(weights: SiteWeights) -> None:
            old = weights.entries[e][s]
            weights.entries[e][s] = Entry(**{"a": old.a, "b": old.b, "scale": old.scale, **fields})

        return change

    def set_a(i: int, a: Tensor):
        return lambda weights: weights.a.__setitem__(i, a)

    unknown = make_adapter("bad")
    unknown.sites["nowhere"] = unknown.sites.pop("o")
    return [
        ("nowhere: the model has no such site", unknown),
        ("it has weights for no site", AdapterWeights("bad", {})),
        (r"o: A 0 must be \[1..16 \(max_rank\), 12\], got \[4, 13\]", changed("o", set_a(0, randn(4, 13)))),
        (r"o: A 0 must be \[1..16 \(max_rank\), 12\], got \[17, 12\]", changed("o", set_a(0, randn(17, 12)))),
        (r"o: A 0 must be \[1..16 \(max_rank\), 12\], got \[0, 12\]", changed("o", set_a(0, randn(0, 12)))),
        (r"o: A 0 must be \[1..16 \(max_rank\), 12\], got \[4\]", changed("o", set_a(0, randn(4)))),
        (
            "o: A 0 must be bfloat16, float16 or float32, got torch.int8",
            changed("o", set_a(0, torch.ones(4, 12).to(torch.int8))),
        ),
        (r"qkv: slice s1: B must be \[5, 4\], got \[5, 3\]", changed("qkv", set_entry(0, 1, b=randn(5, 3)))),
        (r"qkv: slice s0: a must be in \[0, 3\), got 3", changed("qkv", set_entry(0, 0, a=3))),
        ("qkv: slice s2: scale must be finite, got nan", changed("qkv", set_entry(0, 2, scale=float("nan")))),
        ("qkv: slice s2: scale must be finite, got 1e\\+60", changed("qkv", set_entry(0, 2, scale=1e60))),
        (
            "down: expert 2, slice s0: B must be bfloat16, float16 or float32, got torch.float64",
            changed("down", set_entry(2, 0, b=randn(H, 4).double())),
        ),
        ("qkv: A 1 must be finite, got NaN or Inf", changed("qkv", lambda w: w.a[1].view(-1)[-1].fill_(torch.nan))),
        (
            "down: expert 2, slice s0: B must be finite, got NaN or Inf",
            changed("down", set_entry(2, 0, b=torch.full((H, 4), -torch.inf, dtype=torch.bfloat16))),
        ),
        ("down: entries must be for 3 experts, got 2", changed("down", lambda w: w.entries.pop())),
        (
            "gate_up: expert 0, entries must be for 2 slices, got 1",
            changed("gate_up", lambda w: w.entries.__setitem__(0, w.entries[0][:1])),
        ),
        (r"qkv: A \[3\] must be used by a slice", changed("qkv", lambda w: w.a.append(randn(4, H)))),
        ("o: it has no weights", AdapterWeights("bad", {"o": SiteWeights([], [[None]])})),
    ]


@pytest.mark.parametrize(("message", "adapter"), broken_adapters(), ids=[m for m, _ in broken_adapters()])
def test_weights_that_do_not_fit_are_refused_before_memory_is_touched(message: str, adapter: AdapterWeights):
    pool = make_pool()
    with pytest.raises(ValueError, match=r"(?s)polylora::AdapterPool.load: adapter 'bad' does not fit.*" + message):
        pool.load(adapter)
    assert_empty(pool)
    assert pool.generation == 0


def test_one_error_names_every_offending_tensor():
    adapter = make_adapter("bad")
    adapter.sites["o"].a[0] = randn(4, 99)
    adapter.sites["nowhere"] = SiteWeights()
    shared = torch.full((7, 4), torch.nan)
    adapter.sites["gate_up"].entries[0][1] = Entry(1, shared, 1.0)
    adapter.sites["down"].entries[1][0] = Entry(1, randn(3, 3), 1.0)
    with pytest.raises(ValueError) as error:
        make_pool().load(adapter)
    for part in (
        "o: A 0",
        "nowhere: the model has no such site",
        "gate_up: expert 0, slice s1: B must be finite",
        "down: expert 1, slice s0: B must be",
    ):
        assert part in str(error.value)


def test_weights_too_large_for_float16_are_refused():
    adapter = make_adapter("a", sites=["o", "qkv"])
    adapter.sites["qkv"].a[1][2, 3] = 65520.0
    pool = make_pool(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"qkv: weights must fit float16 .* got 65520 in A rows of K = 20"):
        pool.load(adapter)
    assert_empty(pool)
    adapter.sites["qkv"].a[1][2, 3] = 65519.0
    pool.load(adapter)


# ---------------------------------------------------------------------------------------------------------------
# Memory


def test_arenas_grow_and_keep_their_contents():
    pool = make_pool(max_adapters=16)
    adapters = []
    generations = set()
    for i in range(16):
        adapters.append(make_adapter(f"a{i}", rank=1 + i, seed=i))
        pool.load(adapters[-1])
        generations.add(pool.generation)
    check(pool, adapters)
    assert 2 < len(generations) < 16, "doubling: few of the loads grow"


def test_capacity_for_is_enough_and_nothing_moves():
    a_rows, b_elements = make_pool().capacity_for(4, 11)
    pool = make_pool(a_rows=a_rows, b_elements=b_elements)
    pool.freeze()
    generation = pool.generation
    addresses = [arena.tensor.data_ptr() for arena in arenas(pool)]
    adapters = [make_adapter(f"a{i}", rank=11, seed=i) for i in range(4)]
    for adapter in adapters:
        pool.load(adapter)
    check(pool, adapters)
    assert pool.stats()["b"]["largest_free"] == 0, "it was exact"
    assert pool.generation == generation
    assert addresses == [arena.tensor.data_ptr() for arena in arenas(pool)]


def test_a_frozen_pool_says_what_it_needs():
    pool = make_pool()
    first = make_adapter("a", rank=8)
    pool.load(first)
    pool.freeze()
    assert pool.frozen and pool.stats()["frozen"]
    v_widths = {path: pool.site(path).v_width for path in SITES}
    assert v_widths["qkv"] == 48 and v_widths["o"] == 16
    before = snapshot(pool)
    with pytest.raises(PoolFrozen, match=r"frozen with \d+ .*, \d+ used, longest free range \d+; \d+ needed: reserve"):
        pool.load(make_adapter("b", rank=16))
    assert_same(before, snapshot(pool))
    with pytest.raises(PoolFrozen):
        pool.reserve({H: 10**6})
    pool.unload("a")
    again = make_adapter("c", rank=8, seed=3)
    assert pool.load(again) == 0
    check(pool, [again])
    assert v_widths == {path: pool.site(path).v_width for path in SITES}


def test_reserve():
    pool = make_pool()
    kept = make_adapter("kept")
    pool.load(kept)
    generation = pool.generation
    pool.reserve({H: 300}, b_elements=5001)
    assert pool.stats()["a"][H]["capacity"] == 300
    assert pool.generation > generation
    generation = pool.generation
    pool.reserve({H: 10})
    assert pool.generation == generation
    check(pool, [kept])
    capacity = pool.stats()["b"]["capacity"]
    assert capacity % 8 == 0 and capacity >= 5001
    with pytest.raises(ValueError, match=r"a_rows must name widths in \[7, 12, 20, 33\], got 8"):
        pool.reserve({8: 1})


def test_v_width_grows_with_need_and_never_shrinks():
    pool = make_pool()
    assert pool.site("qkv").v_width == 8
    pool.load(make_adapter("a", rank=5))
    assert pool.site("qkv").v_width == 24
    pool.load(make_adapter("b", rank=9))
    assert pool.site("qkv").v_width == 48
    pool.unload("b")
    assert pool.site("qkv").v_width == 48


def test_stats():
    pool = make_pool()
    pool.load(make_adapter("a", rank=4, sites=["o"]))
    stats = pool.stats()
    assert stats["adapters"] == {"a": {"slot": 0, "rank": 4, "bytes": (4 * 12 + H * 8) * 4, "pins": 0}}
    assert stats["free_slots"] == 3
    assert stats["a"][12]["used"] == 4 and stats["b"]["used"] == H * 8
    assert stats["bytes"] == sum(arena.tensor.nbytes for arena in arenas(pool))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be bfloat16"),
        ({"max_adapters": 0}, "max_adapters must be >= 1, got 0"),
        ({"max_rank": 257}, r"max_rank must be in \[1, 256\], got 257"),
        ({"max_rank": 0}, r"max_rank must be in \[1, 256\], got 0"),
    ],
)
def test_refuses_to_be_made(kwargs: dict, message: str):
    with pytest.raises(ValueError, match="polylora::AdapterPool: " + message):
        make_pool(**kwargs)


def test_threads_load_and_unload():
    pool = make_pool(max_adapters=8)
    adapters = [make_adapter(f"a{i}", rank=1 + i, seed=i) for i in range(8)]
    failures = []

    def work(adapter: AdapterWeights) -> None:
        try:
            for _ in range(5):
                pool.load(adapter)
                with pool.acquired([adapter.name]):
                    pass
                pool.unload(adapter.name)
            pool.load(adapter)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(adapter,)) for adapter in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check(pool, adapters)
