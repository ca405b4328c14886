"""The deltas of experts that SGLang's MoE runners ask polylora's backend for, against float64."""

from __future__ import annotations

import types

import pytest
import sglang_source
import torch
from sglang_source import forward_batch, serving  # noqa: F401  (a fixture)

sglang_source.require_sglang()

from polylora.sglang_plugin import backend as plugin  # noqa: E402
from polylora.sglang_plugin.backend import PolyloraLoRABackend  # noqa: E402
from sglang.srt.lora import lora_moe_runners  # noqa: E402
from sglang.srt.lora.layers import FusedMoEWithLoRA  # noqa: E402
from sglang.srt.lora.lora_moe_runners import LoRAInfo  # noqa: E402
from sglang.srt.model_executor.runner_utils import capture_mode  # noqa: E402

SLOTS, EXPERTS, TOP_K, R, HIDDEN, INTER = 4, 6, 3, 8, 32, 24
RANKS = {"a": 8, "b": 3, None: 0}
SLOT_OF = {"a": 0, "b": 3, None: 1}
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-18}


class Runner:
    """What SGLang knows of the runner of the experts."""

    def __init__(self, value="triton"):
        self.value = value

    def __getattr__(self, name):
        return lambda: name == f"is_{self.value}"


@pytest.fixture(params=list(EPS), ids=["bf16", "fp16", "fp32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def backend(serving, dtype, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lora_moe_runners, "build_lora_hooks", lora_moe_runners.build_lora_hooks)
    monkeypatch.setattr(plugin, "get_moe_runner_backend", Runner)
    return make_backend(serving(dtype=dtype))


def make_backend(server_args):
    backend = PolyloraLoRABackend(SLOTS, torch.get_default_device(), server_args)
    backend.validate_lora_targets(torch.nn.Module(), {"gate_up_proj", "down_proj"})
    backend.is_moe_lora = True
    return backend


def make_layer(backend, *, shared=False, gated=True):
    """SGLang's layer as it asks for LoRA; its pool, and by adapter the experts' own A and B of both halves.

    The ranks of a slice lie ``R`` rows apart. Beyond an adapter's rank SGLang's pool holds zeros; here NaN.
    """
    slices = 2 if gated else 1
    outer = 1 if shared else EXPERTS
    up_a = torch.full((SLOTS, outer, slices * R, HIDDEN), torch.nan)
    up_b = torch.full((SLOTS, EXPERTS, slices * INTER, R), torch.nan)
    down_a = torch.full((SLOTS, EXPERTS, R, INTER), torch.nan)
    down_b = torch.full((SLOTS, outer, HIDDEN, R), torch.nan)
    for uid, r in RANKS.items():
        slot = SLOT_OF[uid]
        for s in range(slices):
            up_a[slot, :, s * R : s * R + r] = torch.randn(outer, r, HIDDEN) / HIDDEN**0.5
        up_b[slot, :, :, :r] = torch.randn(EXPERTS, slices * INTER, r)
        down_a[slot, :, :r] = torch.randn(EXPERTS, r, INTER) / INTER**0.5
        down_b[slot, :, :, :r] = torch.randn(outer, HIDDEN, r)
    layer = object.__new__(FusedMoEWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.lora_backend, layer.experts_shared_outer_loras, layer.lora_use_virtual_experts = backend, shared, False
    layer._lora_runner_backend = Runner()
    layer.base_layer = types.SimpleNamespace(num_experts=EXPERTS)
    layer.set_lora_info(up_a, up_b, down_a, down_b)
    return layer


def prepare(backend, batch, *, decode_graph=False):
    slots = [SLOT_OF[uid] for uid in batch.lora_ids]
    ranks, scales = [0] * SLOTS, [0.0] * SLOTS
    for uid in batch.lora_ids:
        ranks[SLOT_OF[uid]], scales[SLOT_OF[uid]] = RANKS[uid], 2.0
    backend.prepare_lora_batch(batch, slots, ranks, scales, decode_graph)
    backend.batch_info.has_active_lora = any(uid is not None for uid in batch.lora_ids)


def check(layer, rows, tokens=None, absent=0.2):
    """Both hooks on the pairs of a layer, against float64. ``tokens``: rows of the pass, those of the batch first."""
    tokens = tokens or len(rows)
    topk_ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    topk_ids[torch.rand(tokens, TOP_K) < absent] = -1
    weights = torch.rand(tokens, TOP_K, dtype=torch.float32)
    x, h = torch.randn(tokens, HIDDEN), torch.randn(tokens * TOP_K, INTER)
    hooks = lora_moe_runners.build_lora_hooks(x, layer._get_lora_info(), topk_ids)
    up_a, up_b = layer.gate_up_lora_a_weights, layer.gate_up_lora_b_weights
    down_a, down_b = layer.down_lora_a_weights, layer.down_lora_b_weights
    slices = up_a.size(2) // R
    y1, y2 = torch.randn(tokens, TOP_K, slices * INTER), torch.randn(tokens, TOP_K, HIDDEN)
    base1, base2 = y1.clone(), y2.clone()
    hooks.after_gate_up(x, y1, weights, topk_ids)
    hooks.after_down(h, y2, weights, topk_ids)
    want1, want2 = base1.double(), base2.double()
    touched = torch.zeros(tokens, TOP_K, dtype=torch.bool)
    for t, uid in enumerate(rows):
        for j, expert in enumerate(topk_ids[t].tolist()):
            if uid is None or expert < 0:
                continue
            touched[t, j] = True
            slot, r = SLOT_OF[uid], RANKS[uid]
            one = 0 if up_a.size(1) == 1 else expert
            for s in range(slices):
                columns = slice(s * INTER, (s + 1) * INTER)
                v = up_a[slot, one, s * R : s * R + r].double() @ x[t].double()
                want1[t, j, columns] += up_b[slot, expert, columns, :r].double() @ v
            one = 0 if down_b.size(1) == 1 else expert
            v = down_a[slot, expert, :r].double() @ h[t * TOP_K + j].double()
            want2[t, j] += weights[t, j].double() * (down_b[slot, one, :, :r].double() @ v)
    for got, want, base in ((y1, want1, base1), (y2, want2, base2)):
        assert torch.equal(got[~touched], base[~touched])
        rounded = got.is_cuda or got.dtype is torch.float32  # of the ranks, too
        bound = want.abs() + (8 if rounded else 0) + 1e-3
        assert ((got.double() - want).abs() <= EPS[got.dtype] * bound).all()
        if touched.any():
            assert (want - base.double())[touched].norm() > 0.12 * want[touched].norm()
    return hooks


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared outer"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
def test_experts(backend, shared, gated):
    layer = make_layer(backend, shared=shared, gated=gated)
    batch = forward_batch(["b", None, "a"], [4, 3, 6])
    prepare(backend, batch)
    check(layer, ["b"] * 4 + [None] * 3 + ["a"] * 6)


def test_experts_of_decode(backend):
    prepare(backend, forward_batch(["b", None, "a", "a"]))
    check(make_layer(backend), ["b", None, "a", "a"])


def test_a_graph_pads_with_tokens_of_nobody(backend):
    layer = make_layer(backend)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    backend.init_cuda_graph_moe_buffers(8, SLOTS, None, layer)  # SGLang's scratch: not made
    assert not hasattr(backend, "moe_cg_buffers") and not backend.resize_cuda_graph_moe_buffers(4)
    for ids in (["a"] * 8, ["b", None, "a"]):
        prepare(backend, forward_batch(ids), decode_graph=True)
        check(layer, ids, tokens=8)


def test_what_sglang_reads_of_a_batch(backend):
    prepare(backend, forward_batch(["b", None, "a"], [2, 1, 3]))
    info = backend.batch_info.moe_lora_info
    assert info.token_lora_mapping.tolist() == [3, 3, -1, 0, 0, 0]
    assert info.seg_indptr.tolist() == [0, 2, 3, 6] and info.req_to_lora.tolist() == [3, 1, 0]
    assert info.adapter_enabled.tolist() == [1, 0, 0, 1]
    backend.init_prefill_cuda_graph_batch_info(32, 5)  # a captured kernel must find any number of requests
    backend.prepare_lora_batch(
        forward_batch(["b"], [2]), [3], [0, 0, 0, 3], [0, 0, 0, 2.0], False, use_prefill_cuda_graph=True
    )
    info = backend.batch_info.moe_lora_info
    assert info.seg_indptr.tolist() == [0, 2, 2, 2, 2, 2] and info.req_to_lora.tolist() == [3, 0, 0, 0, 0]


def test_nobody_has_an_adapter(backend, monkeypatch):
    """Nothing is launched, but into a graph that must serve adapters."""
    layer = make_layer(backend)
    prepare(backend, forward_batch([None] * 2))
    hooks = lora_moe_runners.build_lora_hooks(torch.randn(2, HIDDEN), layer._get_lora_info(), torch.zeros(2, TOP_K))
    assert hooks.after_gate_up is None and hooks.after_down is None
    monkeypatch.setattr(capture_mode, "is_capture_mode", True)
    assert check(layer, [None, None]).after_down is not None


def test_batches_of_others_keep_sglangs_kernels(backend, serving, monkeypatch):  # noqa: F811
    """Those of another backend, and all where SGLang's experimental runners serve the experts."""
    asked = []
    monkeypatch.setattr(lora_moe_runners, "build_lora_hooks", lambda *args: asked.append(args) or "sglang's")
    info = LoRAInfo(*[None] * 8, token_lora_mapping=torch.zeros(2), max_lora_rank=R, num_experts=EXPERTS)
    ours = make_backend(serving())
    prepare(ours, forward_batch(["a"]))
    assert lora_moe_runners.build_lora_hooks(None, info, None) == "sglang's"
    assert lora_moe_runners.build_lora_hooks(None, None, None) == "sglang's"
    assert len(asked) == 2


@pytest.mark.parametrize("runner", ["experimental_sgl_trtllm", "experimental_sgl_marlin"])
def test_experimental_runners_keep_sglangs_kernels(serving, monkeypatch, caplog, runner):  # noqa: F811
    monkeypatch.setattr(plugin, "get_moe_runner_backend", lambda: Runner(runner))
    backend = make_backend(serving())
    backend.is_moe_lora = True
    prepare(backend, forward_batch(["a"]))
    layer = make_layer(backend)
    assert not backend.owns(layer._get_lora_info())
    assert [r.getMessage() for r in caplog.records if r.name == "sglang.polylora"] == [
        f"polylora: experts on the {runner} runner keep SGLang's kernels."
    ]
