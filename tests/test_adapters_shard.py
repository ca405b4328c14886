"""Tensor parallelism: what the ranks compute together is what one device computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from polylora.adapters import Entry, SiteWeights, expert_window, shard, shard_site
from polylora.models import Site, Slice, Source, model_table
from test_adapters_formats import GPT_OSS, NEMOTRON, QWEN


def fill(site: Site, rank: int = 2) -> SiteWeights:
    """Every slice its own A and a B whose rows say where they come from."""
    generator = torch.Generator().manual_seed(0)
    weights = SiteWeights()
    for _ in range(site.experts or 1):
        row = []
        for piece in site.slices:
            row.append(Entry(len(weights.a), torch.randn(piece.width, rank, generator=generator), 0.5))
            weights.a.append(torch.randn(rank, site.k, generator=generator))
        weights.entries.append(row)
    return weights


def delta(weights: SiteWeights, expert: int, index: int) -> torch.Tensor:
    entry = weights.entries[expert][index]
    return entry.scale * entry.b @ weights.a[entry.a]


def check_shapes(site: Site, weights: SiteWeights):
    assert all(a.shape[1] == site.k and a.is_contiguous() for a in weights.a)
    for row in weights.entries:
        for piece, entry in zip(site.slices, row, strict=True):
            assert entry is None or (entry.b.shape[0] == piece.width and entry.b.is_contiguous())
            assert sum(part.width for part in piece.cuts) == piece.width


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", [QWEN, NEMOTRON, GPT_OSS], ids=lambda c: c.model_type)
def test_two_ranks_make_a_whole(config, fused):
    world = 2
    for site in model_table(config, fused).sites.values():
        weights = fill(site)
        locals_ = [shard_site(site, r, world) for r in range(world)]
        parts = [shard(site, weights, r, world) for r in range(world)]
        for local, part in zip(locals_, parts, strict=True):
            check_shapes(local, part)
        for expert in range(site.experts or 1):
            for index, piece in enumerate(site.slices):
                whole = delta(weights, expert, index)
                shares = [delta(part, expert, index) for part in parts]
                if site.parallel == "replicated":
                    assert all(torch.equal(share, whole) for share in shares)
                elif site.parallel == "row" or site.kind == "embedding":
                    torch.testing.assert_close(torch.cat(shares, 1)[:, : site.k], whole)
                elif not piece.parts:
                    torch.testing.assert_close(torch.cat(shares)[: piece.width], whole)
                else:
                    # Each part of the module is cut on its own: rank 0 has the first half of every one.
                    start, at = 0, [0] * world
                    for cut in piece.parts:
                        rows = []
                        for r in range(world):
                            rows.append(shares[r][at[r] : at[r] + cut.width // world])
                            at[r] += cut.width // world
                        torch.testing.assert_close(torch.cat(rows), whole[start : start + cut.width])
                        start += cut.width


def test_row_parallel_sums_up():
    site = model_table(QWEN, fused=True).sites["model.layers.1.self_attn.o_proj"]
    weights, x = fill(site), torch.randn(5, 24)
    parts = [shard(site, weights, r, 4) for r in range(4)]
    y = sum(x[:, r * 6 : r * 6 + 6] @ delta(part, 0, 0).T for r, part in enumerate(parts))
    torch.testing.assert_close(y, x @ delta(weights, 0, 0).T)


def test_few_kv_heads_are_replicated():
    """2 kv heads on 4 ranks: ranks 0 and 1 have head 0, ranks 2 and 3 head 1; q is cut."""
    site = model_table(QWEN, fused=True).sites["model.layers.1.self_attn.qkv_proj"]
    weights = fill(site)
    q, k, v = (delta(weights, 0, i) for i in range(3))
    for rank in range(4):
        part, local = shard(site, weights, rank, 4), shard_site(site, rank, 4)
        check_shapes(local, part)
        assert [s.width for s in local.slices] == [12, 6, 6]
        torch.testing.assert_close(delta(part, 0, 0), q[rank * 12 : rank * 12 + 12])
        head = rank // 2
        torch.testing.assert_close(delta(part, 0, 1), k[head * 6 : head * 6 + 6])
        torch.testing.assert_close(delta(part, 0, 2), v[head * 6 : head * 6 + 6])


def test_whole_module_is_cut_part_by_part():
    """Mamba's in_proj as one slice: gate, x, B, C and dt, the two groups of B and C replicated on 4 ranks."""
    site = model_table(NEMOTRON, fused=False).sites["model.layers.0.mixer.in_proj"]
    fused = model_table(NEMOTRON, fused=True).sites["model.layers.0.mixer.in_proj"]
    weights = fill(site)
    whole = delta(weights, 0, 0)
    for rank in range(4):
        local, part = shard_site(site, rank, 4), delta(shard(site, weights, rank, 4), 0, 0)
        assert [p.width for p in local.slices[0].parts] == [3, 3, 5, 5, 1]
        assert [s.width for s in shard_site(fused, rank, 4).slices] == [3, 3, 5, 5, 1]
        rows = [whole[i] for i in range(rank * 3, rank * 3 + 3)] + [
            whole[12 + i] for i in range(rank * 3, rank * 3 + 3)
        ]
        group = rank // 2 * 5
        rows += [whole[24 + group + i] for i in range(5)] + [whole[34 + group + i] for i in range(5)]
        torch.testing.assert_close(part, torch.stack([*rows, whole[44 + rank]]))


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_vocabulary_is_padded(path):
    site = model_table(QWEN, fused=True).sites[path]
    weights = fill(site)
    whole = delta(weights, 0, 0)
    shares = []
    for rank in range(4):
        local, part = shard_site(site, rank, 4, vocab_padding=16), shard(site, weights, rank, 4, vocab_padding=16)
        check_shapes(local, part)
        assert (local.k if site.kind == "embedding" else local.width) == 8
        shares.append(delta(part, 0, 0))
    axis = 1 if site.kind == "embedding" else 0
    together = torch.cat(shares, axis)
    assert together.shape[axis] == 32 and whole.shape[axis] == 31
    torch.testing.assert_close(together.narrow(axis, 0, 31), whole)
    assert together.narrow(axis, 31, 1).abs().max() == 0


def test_absent_slices_stay_absent_and_shared_a_stays_shared():
    site = model_table(QWEN, fused=True).sites["model.layers.1.self_attn.qkv_proj"]
    weights = SiteWeights(
        [torch.randn(2, 20)], [[Entry(0, torch.randn(48, 2), 1.0), None, Entry(0, torch.randn(12, 2), 1.0)]]
    )
    part = shard(site, weights, 1, 2)
    assert part.entries[0][1] is None and [part.entries[0][i].a for i in (0, 2)] == [0, 0] and len(part.a) == 1


def test_what_does_not_divide_is_refused():
    site = model_table(QWEN, fused=True).sites["model.layers.1.self_attn.qkv_proj"]
    with pytest.raises(ValueError, match=r"qkv_proj: expected a size divisible by 3 ranks, got 4"):
        shard(site, fill(site), 0, 3)
    with pytest.raises(ValueError, match="rank 2, world 2"):
        shard(site, fill(site), 2, 2)
    odd = Site("x", "linear", 4, (Slice("k", 9, 3),), (Source("x", ("k",)),))
    with pytest.raises(ValueError, match="4 ranks to be a multiple of 3 heads"):
        shard_site(odd, 0, 4)
    row = dataclasses.replace(odd, parallel="row")
    with pytest.raises(ValueError, match="divisible by 3 ranks, got 4"):
        shard(row, fill(row), 0, 3)


def test_expert_window():
    site = model_table(QWEN, fused=True).sites["model.layers.0.mlp.experts.gate_up_proj"]
    weights = fill(site)
    weights.entries[2][0] = None
    part = expert_window(weights, 1, 2)
    assert len(part.entries) == 2 and len(part.a) == 3 and part.entries[1][0] is None
    for expert, index in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(delta(part, expert, index), delta(weights, expert + 1, index))
    with pytest.raises(ValueError, match="expected a window of 0..2, got 2 from 2"):
        expert_window(weights, 2, 2)
