"""What stands in for vLLM's ops when its own tests run on polylora (vllm_own.py), against plain torch."""

from __future__ import annotations

import pytest
import torch
import vllm_own

M, K, RANK, SLOTS, WIDTH = 20, 40, 6, 4, 24


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("slices", [1, 3])
def test_shrink(slices):
    rows = torch.randint(-1, SLOTS, (M,))
    x, weights = torch.rand(M, K), [torch.rand(SLOTS, RANK, K) for _ in range(slices)]
    out = torch.zeros(slices, M, RANK)
    vllm_own.lora_shrink(x, weights, out, rows, None, 0.5)
    want = torch.stack([torch.einsum("mk,mrk->mr", x, w[rows]) for w in weights]) * 0.5
    torch.testing.assert_close(out, want * (rows >= 0)[:, None])
    assert (rows < 0).any() and want.norm() > 1


@pytest.mark.parametrize("slices", [1, 3])
def test_expand(slices):
    rows = torch.randint(-1, SLOTS, (M,))
    v, weights = torch.rand(slices, M, RANK), [torch.rand(SLOTS, WIDTH, RANK) for _ in range(slices)]
    out = torch.rand(M, WIDTH * slices)
    delta = torch.cat([torch.einsum("mr,mnr->mn", v[s], weights[s][rows]) for s in range(slices)], 1)
    want = out + delta * (rows >= 0)[:, None]
    vllm_own.lora_expand(v, weights, out, rows, None, offset_start=0, add_inputs=True)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("slices", [1, 2])
def test_moe(slices):
    experts, top_k = 5, 3
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(M)])
    slots = torch.randint(0, SLOTS, (M,))
    a = [torch.rand(SLOTS, experts, RANK, K) for _ in range(slices)]
    b = [torch.rand(SLOTS, experts, WIDTH, RANK) for _ in range(slices)]
    x, y = torch.rand(M, K), torch.zeros(M, top_k, WIDTH * slices)
    vllm_own.moe_gate_up(ids, None, slots, RANK, top_k, None, a, b, x, y, SLOTS, experts, 16)
    pairs = [
        torch.einsum("mk,mjrk,mjnr->mjn", x, a[s][slots[:, None], ids], b[s][slots[:, None], ids])
        for s in range(slices)
    ]
    torch.testing.assert_close(y, torch.cat(pairs, -1))


def test_another_folder_is_refused(tmp_path, capsys):
    assert vllm_own.main(tmp_path, []) == 2
    assert "is not vLLM's tests/lora: no __init__.py, conftest.py" in capsys.readouterr().err
