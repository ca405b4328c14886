"""SGLang's LoRA layers on polylora's backend, against float64. SGLang's files; sglang_source.py says what is not."""

from __future__ import annotations

import inspect
import os
import types

import pytest
import sglang_source
import torch
from sglang_source import forward_batch, serving  # noqa: F401  (a fixture)
from torch import Tensor

sglang_source.require_sglang()

from polylora.sglang_plugin.backend import PolyloraLoRABackend  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402
from sglang.srt.lora import layers as sglang_layers  # noqa: E402
from sglang.srt.lora.backend.base_backend import BaseLoRABackend  # noqa: E402
from sglang.srt.lora.backend.chunked_backend import ChunkedSgmvLoRABackend  # noqa: E402
from sglang.srt.lora.utils import capturing_lora_graph  # noqa: E402
from sglang.srt.model_executor.runner_utils import capture_mode  # noqa: E402

SLOTS, RANK, K, VOCAB, DIM = 5, 16, 48, 90, 40
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-18}
#: By slot. Slot 2 is the base model's; slot 4 holds an adapter that no batch uses.
RANKS, SCALES = {0: 16, 1: 5, 2: 0, 3: 1, 4: 8}, {0: 0.5, 1: 2.0, 2: 0.0, 3: 1.25, 4: 1.0}
ADAPTERS = {"a": 0, "b": 1, None: 2, "c": 3}
MIXED = ["b", None, "a", "a", "c", None, "b"]
LENGTHS = [3, 2, 1, 5, 1, 4, 2]
# base layer, widths of the slices that LoRA knows of, attributes of the layer with LoRA
LINEARS = {
    "replicated": (lambda: ReplicatedLinear(K, 24, bias=False), [24], {}),
    "fused_qkv_a": (lambda: ReplicatedLinear(K, 24, bias=False), [16, 8], {"first_output_dim": 16}),
    "row": (lambda: RowParallelLinear(K, 24, bias=False), [24], {}),
    "column": (lambda: ColumnParallelLinear(K, 19, bias=True), [19], {}),
    "gate_up": (lambda: MergedColumnParallelLinear(K, [40, 40], bias=False), [40, 40], {}),
    "qkv": (lambda: QKVParallelLinear(K, 8, 8, 2, bias=False), [64, 16, 16], {}),
    "four": (lambda: MergedColumnParallelLinear(K, [8, 24, 16, 32], bias=False), [8, 24, 16, 32], {}),
    "two of five": (lambda: MergedColumnParallelLinear(K, [8, 24, 16, 32, 8], bias=False), [8, 24], {}),
}


@pytest.fixture(params=list(EPS), ids=["bf16", "fp16", "fp32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def backend(serving, dtype):  # noqa: F811
    return make_backend(serving(dtype=dtype))


def make_backend(server_args, target_modules=("lm_head",)):
    backend = PolyloraLoRABackend(SLOTS, torch.get_default_device(), server_args)
    backend.validate_lora_targets(torch.nn.Module(), set(target_modules))
    return backend


def prepare(backend, batch, graph=None):
    """As SGLang's manager does. ``graph``: "decode" or "prefill"."""
    slots = [ADAPTERS[uid] for uid in batch.lora_ids]
    ranks = [RANKS[slot] if slot in slots else 0 for slot in range(SLOTS)]
    scales = [SCALES[slot] if slot in slots else 0 for slot in range(SLOTS)]
    prefill = {"use_prefill_cuda_graph": graph == "prefill"}
    backend.prepare_lora_batch(batch, slots, ranks, scales, graph == "decode", **prefill)
    backend.batch_info.has_active_lora = any(ranks[slot] > 0 for slot in slots)


def rows_of(batch) -> list[str | None]:
    """The adapter of each row."""
    lengths = batch.extend_seq_lens_cpu or [1] * batch.batch_size
    return [uid for uid, length in zip(batch.lora_ids, lengths, strict=True) for _ in range(length)]


def make_pool(widths, k, dtype, rank=RANK, embedding=False):
    """A and B in SGLang's layout, NaN where nothing belongs to an adapter, and each adapter's own A and B by slice."""
    inputs = (k,) if not embedding else (VOCAB,)
    a = torch.full((SLOTS, len(widths) * rank, *inputs), torch.nan, dtype=dtype)
    b = torch.full((SLOTS, sum(widths), rank), torch.nan, dtype=dtype)
    adapters = {}
    for uid, slot in ADAPTERS.items():
        r = RANKS[slot]
        own_a = [(torch.randn(r, *inputs) / inputs[0] ** 0.5).to(dtype) for _ in widths]
        own_b = [torch.randn(width, r).to(dtype) for width in widths]
        a[slot, : len(widths) * r] = torch.cat(own_a)
        b[slot, :, :r] = torch.cat(own_b)
        adapters[uid] = own_a, own_b
    return a, b, adapters


def make_linear(name, backend, dtype):
    build, widths, attributes = LINEARS[name]
    base = build()
    for parameter in base.parameters():
        parameter.data.normal_(std=K**-0.5)
    layer = sglang_layers.get_lora_layer(base, backend)
    for key, value in attributes.items():
        setattr(layer, key, value)
    a, b, adapters = make_pool(widths, K, dtype)
    layer.set_lora_info(a, b)
    return layer, widths, adapters


def base_of(layer, *args) -> Tensor:
    """What the layer returns without LoRA."""
    layer.set_lora = False
    y = layer(*args)
    layer.set_lora = True
    return y[0] if isinstance(y, tuple) else y


def deltas(x, rows, adapters, widths, embedding=False):
    """In float64 the delta of each row, and the sum of what its terms are worth, as a measure of their rounding."""
    delta = torch.zeros(len(rows), sum(widths), dtype=torch.float64)
    worth = torch.zeros_like(delta)
    for row, uid in enumerate(rows):
        begin = 0
        for a, b, width in zip(*adapters[uid], widths, strict=True):
            if a.size(0) and not (embedding and not 0 <= x[row] < a.size(1)):
                v = a[:, x[row]].double() if embedding else a.double() @ x[row].double()
                scale, columns = SCALES[ADAPTERS[uid]], slice(begin, begin + width)
                delta[row, columns] = scale * (b.double() @ v)
                worth[row, columns] = scale * (b.double().abs() @ v.abs())
            begin += width
    return delta, worth


def check(got: Tensor, base: Tensor, x, rows, adapters, widths, *, embedding=False, parts=1) -> None:
    """Rows with an adapter against float64, the rest bit for bit; and the delta must be worth speaking of."""
    delta, worth = deltas(x, rows, adapters, widths, embedding)
    want = base.double().clone()
    want[: len(rows), : sum(widths)] += delta
    touched = torch.zeros_like(want, dtype=torch.bool)
    touched[: len(rows), : sum(widths)] = worth > 0
    assert torch.equal(got[~touched], base[~touched])
    assert touched.any() == any(uid is not None for uid in rows)
    if touched.any():
        bound = want.abs() + 1e-3
        if base.is_cuda or base.dtype is torch.float32:  # x A^T is rounded once, too
            bound[: len(rows), : sum(widths)] += worth
        error = (got.double() - want).abs()
        assert (error <= parts * EPS[base.dtype] * bound).all(), error.max()
        with_lora = [row for row, uid in enumerate(rows) if uid is not None]
        assert delta[with_lora].norm() > 0.12 * want[with_lora].norm()


# ------------------------------------------------------------------------------------------------------ the interface


def test_methods_take_what_sglangs_callers_give():
    """Every argument of SGLang's base class and of csgmv, by its name; and nothing abstract is left."""
    for name, theirs in inspect.getmembers(BaseLoRABackend, inspect.isfunction):
        if name.startswith("_") or name in ("owns", "resize_cuda_graph_moe_buffers"):
            continue
        ours = inspect.signature(getattr(PolyloraLoRABackend, name)).parameters
        csgmv = inspect.signature(getattr(ChunkedSgmvLoRABackend, name)).parameters
        for other in (inspect.signature(theirs).parameters, csgmv):
            for parameter in other.values():
                if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    continue
                # SGLang passes the flag of decode's graphs at its place: it has two names
                at_its_place = {"use_cuda_graph": "use_decode_cuda_graph"}.get(parameter.name, parameter.name)
                assert at_its_place in ours, (name, parameter.name)
                assert list(ours).index(at_its_place) == list(other).index(parameter.name) or "run_" in name, name


@pytest.mark.parametrize("modes", ["enable_pdmux", "enable_two_batch_overlap"])
def test_modes_with_two_batches_in_flight_are_refused(serving, modes):  # noqa: F811
    with pytest.raises(ValueError, match="--lora-backend polylora does not support --" + modes.replace("_", "-")):
        make_backend(types.SimpleNamespace(**{modes: True}))


def test_deterministic_inference_is_batch_invariance(monkeypatch):
    """SGLang's own switch: its Triton kernels add over K in one order, whatever the batch."""
    for before, after in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("POLYLORA_BATCH_INVARIANT", "")
        if before is None:
            monkeypatch.delenv("POLYLORA_BATCH_INVARIANT")
        else:
            monkeypatch.setenv("POLYLORA_BATCH_INVARIANT", before)
        make_backend(types.SimpleNamespace(enable_deterministic_inference=True))
        assert os.environ["POLYLORA_BATCH_INVARIANT"] == after


def test_dp_attention_is_not_claimed():
    assert not PolyloraLoRABackend.supports_dp_attention


# ------------------------------------------------------------------------------------------------------------- linears


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["decode", "extend"])
def test_linear(backend, dtype, name, lengths):
    layer, widths, adapters = make_linear(name, backend, dtype)
    batch = forward_batch(MIXED, lengths)
    prepare(backend, batch)
    rows = rows_of(batch)
    x = torch.randn(len(rows), K)
    base = base_of(layer, x)
    check(layer(x)[0], base, x, rows, adapters, widths)


@pytest.mark.parametrize("name", LINEARS)
def test_halves(backend, dtype, name):
    """The older interface, A and B apart, gives the same as the fused call to the last rounding."""
    layer, widths, adapters = make_linear(name, backend, dtype)
    batch = forward_batch(MIXED, LENGTHS)
    prepare(backend, batch)
    rows = rows_of(batch)
    x = torch.randn(len(rows), K)
    base = base_of(layer, x)
    check(layer.apply_lora(base.clone(), x), base, x, rows, adapters, widths)


def test_halves_without_a_base_output(backend, dtype):
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    batch = forward_batch(MIXED)
    prepare(backend, batch)
    x = torch.randn(len(MIXED), K)
    offsets = {"output_offset": layer.output_offset, "output_offset_cpu": layer.output_offset_cpu}
    y = backend.run_qkv_lora(x, layer.lora_a, layer.lora_b, max_qkv_out_dim=64, **offsets)
    check(y, torch.zeros_like(y), x, MIXED, adapters, widths)


def test_halves_of_several_slices(backend, dtype):
    """A's result has slice s at column s * r_max, zeros where a row has no such rank; B reads it so."""
    layer, widths, adapters = make_linear("four", backend, dtype)
    prepare(backend, forward_batch(MIXED))
    x = torch.randn(len(MIXED), K)
    v = backend.run_lora_a_sgemm(x, layer.lora_a, stack_num=4)
    assert v.shape == (len(MIXED), 4 * RANK) and v.dtype == torch.float32
    for row, uid in enumerate(MIXED):
        for s, a in enumerate(adapters[uid][0]):
            part = v[row, s * RANK : (s + 1) * RANK].double()
            torch.testing.assert_close(part[: a.size(0)], a.double() @ x[row].double(), atol=1e-4, rtol=1e-4)
            assert not part[a.size(0) :].any()
    y = backend.run_lora_b_sgemm(v, layer.lora_b, output_offset_cpu=torch.tensor([0, 8, 32, 48, 80]))
    check(y, torch.zeros_like(y), x, MIXED, adapters, widths)


def test_inputs_of_a_view_and_outputs_of_other_widths(backend, dtype):
    """x may be part of a wider tensor."""
    layer, widths, adapters = make_linear("gate_up", backend, dtype)
    prepare(backend, forward_batch(MIXED))
    x = torch.randn(len(MIXED), K + 16)[:, 8 : 8 + K]
    base = base_of(layer, x)
    check(layer(x)[0], base, x, MIXED, adapters, widths)


@pytest.mark.parametrize("name", ["qkv", "row"])
def test_nobody_has_an_adapter(backend, dtype, name):
    layer, _, _ = make_linear(name, backend, dtype)
    prepare(backend, forward_batch([None] * 4))
    x = torch.randn(4, K)
    assert not layer.lora_active
    base = base_of(layer, x)
    y = base.clone()
    backend.forward_with_base(layer, x, lambda: y, layer.lora_a, layer.lora_b, None, layer.lora_offsets)
    assert torch.equal(y, base)


def test_a_request_without_an_adapter_beside_one_in_slot_0(backend, dtype):
    """Where the base model has no slot, SGLang gives such a request slot 0, whoever's that is."""
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    backend.prepare_lora_batch(forward_batch(["a", None]), [0, 0], [16, 0, 0, 0, 0], [0.5, 0, 0, 0, 0], False)
    backend.batch_info.has_active_lora = True
    x = torch.randn(2, K)
    base = base_of(layer, x)
    check(layer(x)[0], base, x, ["a", None], adapters, widths)


def test_token_segments(backend, dtype):
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    segments = {"segment_lens": [2, 3, 1], "weight_indices": [1, 2, 0]}
    backend.prepare_lora_token_segments(**segments, lora_ranks=[*RANKS.values()], scalings=[*SCALES.values()])
    rows = ["b", "b", None, None, None, "a"]
    x = torch.randn(6, K)
    base = base_of(layer, x)
    backend.batch_info.has_active_lora = True
    check(layer(x)[0], base, x, rows, adapters, widths)


@pytest.mark.parametrize("ranks", [2, 4])
def test_row_parallel_ranks_add_up(serving, dtype, ranks):  # noqa: F811
    """Each rank adds its part of the delta to its part of the base's output; one all-reduce sums both."""
    parts, rows = [], rows_of(forward_batch(MIXED, LENGTHS))
    for rank in range(ranks):
        backend = make_backend(serving(rank, ranks, dtype))
        weight, x = torch.randn(24, K) / K**0.5, torch.randn(len(rows), K)  # the same on every rank
        a, b, adapters = make_pool([24], K, dtype)
        base = RowParallelLinear(K, 24, bias=False)
        layer = sglang_layers.get_lora_layer(base, backend)
        mine = slice(rank * K // ranks, (rank + 1) * K // ranks)
        base.weight.data.copy_(weight[:, mine])
        sliced = torch.stack([layer.slice_lora_a_weights(a[slot]) for slot in range(SLOTS)])
        assert torch.equal(sliced, a[:, :, mine]) or a.isnan().any()
        layer.set_lora_info(sliced, b)
        prepare(backend, forward_batch(MIXED, LENGTHS))
        reduced = []
        reduce = sglang_layers.tensor_model_parallel_all_reduce
        sglang_layers.tensor_model_parallel_all_reduce = lambda t, seen=reduced: seen.append(t.clone()) or t
        try:
            parts.append((base_of(layer, x[:, mine]), layer(x[:, mine])[0]))
        finally:
            sglang_layers.tensor_model_parallel_all_reduce = reduce
        assert len(reduced) == 2 and torch.equal(reduced[1], parts[-1][1])  # one without LoRA, one with
    base, got = (sum(part[i].double() for part in parts) for i in (0, 1))
    delta, worth = deltas(x, rows, adapters, [24])
    biggest = sum(part[1].double().abs() for part in parts) + worth + 1e-3
    assert ((got - base - delta).abs() <= 2 * EPS[dtype] * biggest).all()
    assert delta.norm() > 0.12 * (base + delta).norm()


# -------------------------------------------------------------------------------------------------------------- graphs


def test_decode_graphs_pad_with_rows_of_nobody(backend, dtype):
    """A graph's rows behind the batch keep the base's bits, whatever an earlier batch had there."""
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    address = None
    for ids in (MIXED + ["a"], ["c"], [None, "a", "b"], [None], ["b"] * 8):
        prepare(backend, forward_batch(ids), "decode")
        address = address or backend.batch_info.rows.slots.data_ptr()
        assert backend.batch_info.rows.slots.data_ptr() == address and backend.batch_info.use_cuda_graph
        x = torch.randn(8, K)
        base = base_of(layer, x)
        backend.batch_info.has_active_lora = True
        check(layer(x)[0], base, x, ids + [None] * (8 - len(ids)), adapters, widths)


def test_target_verification(backend, dtype):
    """Speculative decoding: some rows a request, in decode's graphs."""
    layer, widths, adapters = make_linear("gate_up", backend, dtype)
    backend.init_decode_cuda_graph_batch_info(8, 3)
    prepare(backend, forward_batch(["a", None, "b"], verify=3), "decode")
    assert backend.lm_head_batch_info is None
    rows = ["a"] * 3 + [None] * 3 + ["b"] * 3
    x = torch.randn(24, K)
    base = base_of(layer, x)
    check(layer(x)[0], base, x, rows + [None] * 15, adapters, widths)


def test_prefill_graphs_pad_rows_and_requests(backend, dtype):
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    backend.init_prefill_cuda_graph_batch_info(32, 10)
    assert (backend.prefill_cuda_graph_max_bs, backend.prefill_cuda_graph_max_tokens) == (10, 32)
    for ids, lengths in ((MIXED, LENGTHS), (["a"], [32]), (["c", None], [1, 7])):
        batch = forward_batch(ids, lengths)
        prepare(backend, batch, "prefill")
        assert backend.batch_info is backend.prefill_cuda_graph_batch_info
        rows = rows_of(batch)
        x = torch.randn(32, K)
        base = base_of(layer, x)
        check(layer(x)[0], base, x, rows + [None] * (32 - len(rows)), adapters, widths)


def test_sglangs_description_of_a_batch(backend):
    """SGLang's own kernels read segments; those behind a batch are empty."""
    backend.init_prefill_cuda_graph_batch_info(32, 10)
    prepare(backend, forward_batch(MIXED, LENGTHS), "prefill")
    info = backend.batch_info
    starts = [0, 3, 5, 6, 11, 12, 16, 18, 18, 18, 18]
    assert info.seg_indptr.tolist() == starts and info.weight_indices.tolist() == [1, 2, 0, 0, 3, 2, 1, 0, 0, 0]
    assert info.lora_ranks.tolist() == [16, 5, 0, 1, 0] and info.scalings.tolist() == [0.5, 2.0, 0.0, 1.25, 0.0]
    assert (info.bs, info.num_segments, info.max_len, info.expected_tokens) == (7, 7, 5, 18)
    prepare(backend, forward_batch(MIXED))
    info = backend.batch_info
    assert info.seg_indptr.tolist() == list(range(8)) and not info.use_cuda_graph and info.max_len == 1


def test_batches_that_do_not_fit(backend):
    with pytest.raises(RuntimeError, match="init_decode_cuda_graph_batch_info must come before"):
        prepare(backend, forward_batch(["a"]), "decode")
    with pytest.raises(RuntimeError, match="init_prefill_cuda_graph_batch_info must come before"):
        prepare(backend, forward_batch(["a"], [2]), "prefill")
    backend.init_decode_cuda_graph_batch_info(2, 1)
    with pytest.raises(ValueError, match="up to 2 requests and 256 rows, got 3 and 3"):
        prepare(backend, forward_batch(["a"] * 3), "decode")


def test_layers_of_other_rows_than_the_batch(backend, dtype):
    """Fewer rows would be taken for the first ones, more would be read behind the end: an error, not a guess."""
    layer, _, _ = make_linear("qkv", backend, dtype)
    prepare(backend, forward_batch(MIXED))
    layer(torch.randn(8, K))  # padded by tensor parallelism
    with pytest.raises(ValueError, match="of this batch has 7 rows, padded to 256 at the most, got 6"):
        layer(torch.randn(6, K))
    with pytest.raises(ValueError, match="got 257"):
        layer(torch.randn(257, K))


def test_layers_before_a_batch(backend, dtype):
    layer, _, _ = make_linear("qkv", backend, dtype)
    assert not layer.lora_active  # SGLang's layers do not call it then
    with pytest.raises(RuntimeError, match="before prepare_lora_batch"):
        backend.run_lora_a_sgemm(torch.randn(1, K), layer.lora_a, stack_num=3)
    prepare(backend, forward_batch(MIXED))
    backend.reset_batch_state()
    assert not layer.lora_active and backend.batch_info is None


def test_one_plan_a_pass(backend, dtype, monkeypatch):
    """Layers of a pass share a plan; the next batch, and a pass that is to be captured, make it anew."""
    layer, _, _ = make_linear("qkv", backend, dtype)
    made, plan = [], torch.ops.polylora.plan

    def counted(*args):
        made.append(args[1].size(0))
        with torch._C.DisableTorchFunction():  # with a default device, an op looks itself up by name, and finds this
            plan(*args)

    monkeypatch.setattr(torch.ops.polylora, "plan", counted)
    prepare(backend, forward_batch(MIXED))
    for _ in range(3):
        layer(torch.randn(7, K))
    assert made == [7]
    backend.init_decode_cuda_graph_batch_info(8, 1)
    prepare(backend, forward_batch(MIXED), "decode")
    assert made == [7]  # a graph that is replayed has its own
    layer(torch.randn(8, K))
    layer(torch.randn(8, K))
    assert made == [7, 8]
    backend.reset_routing_cache()
    with capture_mode.capture_lora_variant("nolora"):
        backend.reset_routing_cache()
    assert made == [7, 8, 7]


def test_graphs_of_batches_without_adapters_hold_nothing(backend, dtype, monkeypatch):
    layer, _, _ = make_linear("qkv", backend, dtype)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    prepare(backend, forward_batch([None] * 8), "decode")
    monkeypatch.setattr(capture_mode, "is_capture_mode", True)
    assert capturing_lora_graph() and layer.lora_active
    with capture_mode.capture_lora_variant("nolora"):
        assert not layer.lora_active


# -------------------------------------------------------------------------------------------------------------- tables


def test_layers_of_one_shape_share_a_table(backend, dtype):
    layers = [make_linear("qkv", backend, dtype) for _ in range(3)] + [make_linear("gate_up", backend, dtype)]
    prepare(backend, forward_batch(MIXED))
    for layer, widths, adapters in layers:
        x = torch.randn(7, K)
        base = base_of(layer, x)
        check(layer(x)[0], base, x, MIXED, adapters, widths)
    assert len(backend.tables._tables) == 2


@pytest.mark.parametrize(("rank", "scale"), [(3, 2.0), (5, 0.75)], ids=["rank", "scale"])
def test_another_adapter_in_a_slot(backend, dtype, monkeypatch, rank, scale):
    """The table changes in place, and only when a slot has got another rank or scale."""
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    prepare(backend, forward_batch(MIXED))
    layer(torch.randn(7, K))
    (table,) = backend.tables._tables.values()
    before, address = table.table.clone(), table.table.data_ptr()
    prepare(backend, forward_batch([None, "b"]))
    assert torch.equal(table.table, before)
    monkeypatch.setitem(RANKS, 1, rank)
    monkeypatch.setitem(SCALES, 1, scale)
    a, b, adapters = make_pool(widths, K, dtype)
    layer.lora_a.copy_(a), layer.lora_b.copy_(b)
    prepare(backend, forward_batch([None, "b", "a"]))
    assert table.table.data_ptr() == address and not torch.equal(table.table, before)
    x = torch.randn(3, K)
    base = base_of(layer, x)
    check(layer(x)[0], base, x, [None, "b", "a"], adapters, widths)


def test_inference_mode_comes_and_goes(backend, dtype):
    layer, widths, adapters = make_linear("qkv", backend, dtype)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    for inference, ids in ((True, ["a"]), (False, ["b"]), (True, ["c", "b"])):
        with torch.inference_mode(inference):
            prepare(backend, forward_batch(ids), "decode")
            x = torch.randn(8, K)
            base = base_of(layer, x)
            check(layer(x)[0], base, x, ids + [None] * (8 - len(ids)), adapters, widths)


def test_ranks_above_polyloras(serving):  # noqa: F811
    backend = make_backend(serving())
    a, b = torch.zeros(SLOTS, 512, K), torch.zeros(SLOTS, 24, 512)
    backend.tables.set_slots([512, 0, 0, 0, 0], [1.0] * 5)
    with pytest.raises(ValueError, match="rank"):
        backend.tables.linear(a, b, [24])


# ------------------------------------------------------------------------------------------------ embedding and lm_head


def make_embedding(backend, dtype):
    base = VocabParallelEmbedding(VOCAB, DIM)
    base.weight.data.normal_()
    layer = sglang_layers.get_lora_layer(base, backend)
    a, b, adapters = make_pool([DIM], None, dtype, embedding=True)
    layer.set_lora_info(None, a, b)
    return layer, adapters


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["decode", "extend"])
def test_embedding(backend, dtype, lengths):
    """Tokens outside the vocabulary (images) have no delta."""
    layer, adapters = make_embedding(backend, dtype)
    batch = forward_batch(MIXED, lengths)
    prepare(backend, batch)
    rows = rows_of(batch)
    ids = torch.randint(VOCAB, (len(rows),))
    ids[0], ids[2] = VOCAB - 1, VOCAB + 5
    base = base_of(layer, ids)
    check(layer(ids), base, ids, rows, adapters, [DIM], embedding=True)
    check(layer.apply_lora(base.clone(), ids), base, ids, rows, adapters, [DIM], embedding=True)


def test_embedding_in_a_graph(backend, dtype):
    layer, adapters = make_embedding(backend, dtype)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    prepare(backend, forward_batch(["b", None, "a"]), "decode")
    ids = torch.randint(VOCAB, (8,))
    base = base_of(layer, ids)
    check(layer(ids), base, ids, ["b", None, "a"] + [None] * 5, adapters, [DIM], embedding=True)


def test_tokens_of_adapters(backend, dtype):
    """SGLang's layers refuse adapters that add tokens; its backends' method serves them."""
    layer, _ = make_embedding(backend, dtype)
    prepare(backend, forward_batch(["b", None, "a", "c"]))
    extra, output = torch.randn(SLOTS, 2, DIM).to(dtype), torch.randn(4, DIM).to(dtype)
    ids = torch.tensor([VOCAB + 1, VOCAB, 3, VOCAB + 2])
    want = torch.stack([extra[1, 1], output[1], output[2], output[3]])
    got = backend.run_extra_token_embedding(ids, output, extra, VOCAB)
    assert got is output and torch.equal(output, want)
    with pytest.raises(NotImplementedError, match="tokens of their own"):
        backend.run_lora_a_embedding(ids, layer.embedding_A_buffer, VOCAB, extra)


def make_head(backend, dtype):
    base = ParallelLMHead(VOCAB, K)
    base.weight.data.normal_(std=K**-0.5)
    layer = sglang_layers.get_lora_layer(base, backend)
    a, b, adapters = make_pool([VOCAB], K, dtype)
    b = torch.stack([layer.slice_lora_b_weights(b[slot]) for slot in range(SLOTS)])
    layer.set_lora_info(a, b)
    return layer, adapters


def test_lm_head_of_decode(backend, dtype):
    layer, adapters = make_head(backend, dtype)
    prepare(backend, forward_batch(MIXED))
    x = torch.randn(7, K)
    base = base_of(layer, x)
    assert base.size(1) > VOCAB  # SGLang pads it
    check(layer(x), base, x, MIXED, adapters, [VOCAB])


def test_lm_head_of_a_prefill(backend, dtype):
    """The last row of each request."""
    layer, adapters = make_head(backend, dtype)
    prepare(backend, forward_batch(MIXED, LENGTHS))
    x = torch.randn(7, K)
    base = base_of(layer, x)
    check(layer(x), base, x, MIXED, adapters, [VOCAB])
    check(layer.apply_lora(base.clone(), x), base, x, MIXED, adapters, [VOCAB])
    with pytest.raises(RuntimeError, match="token count mismatch"):
        layer(torch.randn(6, K))


def test_lm_head_of_a_prefill_with_logprobs(backend, dtype):
    """Rows from a start on, one at least; with more of them than a part holds, in parts."""
    layer, adapters = make_head(backend, dtype)
    starts = [1, 2, 0, 2, 1, 0, 2]
    rows = ["b"] * 2 + [None] + ["a"] + ["a"] * 3 + ["c"] + [None] * 4 + ["b"]
    x = torch.randn(len(rows), K)
    prepare(backend, forward_batch(MIXED, LENGTHS, logprob_starts=starts))
    base = base_of(layer, x)
    check(layer(x), base, x, rows, adapters, [VOCAB])
    with envs.SGLANG_LOGPROB_CHUNK_SIZE.override(5), envs.SGLANG_ENABLE_LOGPROB_CHUNK.override(True):
        prepare(backend, forward_batch(MIXED, LENGTHS, logprob_starts=starts))
    assert [info.expected_tokens for info in backend.lm_head_pass_batch_infos] == [5, 5, 3]
    for i in range(3):
        layer.set_lm_head_pass(i)
        part = slice(5 * i, 5 * i + 5)
        check(layer(x[part]), base_of(layer, x[part]), x[part], rows[part], adapters, [VOCAB])
    layer.reset_lm_head_pass()
    check(layer(x), base, x, rows, adapters, [VOCAB])


def test_lm_head_that_is_no_target(serving):  # noqa: F811
    backend = make_backend(serving(), target_modules=("qkv_proj",))
    prepare(backend, forward_batch(MIXED, LENGTHS))
    assert backend.lm_head_batch_info is None


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_of_the_vocabulary(serving, dtype, rank, monkeypatch):  # noqa: F811
    """Two ranks: each has its part of lm_head's logits, and the whole delta of the embedding."""
    monkeypatch.setattr("sglang.srt.layers.layer_boundary.get_attn_tp_context", unscattered)
    backend = make_backend(serving(rank, 2, dtype))
    layer, adapters = make_head(backend, dtype)
    shard = layer.base_layer.shard_indices
    mine = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
    adapters = {uid: (a, [b[0][mine]]) for uid, (a, b) in adapters.items()}
    prepare(backend, forward_batch(MIXED))
    x = torch.randn(7, K)
    base = base_of(layer, x)
    check(layer(x), base, x, MIXED, adapters, [mine.stop - mine.start])
    monkeypatch.setattr(
        "sglang.srt.layers.vocab_parallel_embedding.tensor_model_parallel_all_reduce", lambda t, *a, **k: t
    )
    layer, adapters = make_embedding(backend, dtype)
    ids = torch.randint(VOCAB, (7,))
    base = base_of(layer, ids)
    delta, worth = deltas(ids, MIXED, adapters, [DIM], embedding=True)
    error = (layer(ids).double() - base.double() - delta).abs()
    assert (error <= 2 * EPS[dtype] * (base.double().abs() + delta.abs() + worth + 1e-3)).all()


def unscattered():
    return types.SimpleNamespace(allow_input_scattered=False)


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.cuda_only
@pytest.mark.parametrize("name", ["qkv", "row", "four"])
def test_a_captured_graph_serves_any_batch(serving, device, name):  # noqa: F811
    backend = make_backend(serving())
    layer, widths, adapters = make_linear(name, backend, torch.bfloat16)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    prepare(backend, forward_batch([None] * 8), "decode")
    backend.batch_info.has_active_lora = True
    x = torch.randn(8, K)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.reset_routing_cache()
        y = layer(x)[0]
    for ids in (MIXED, ["c"], [None] * 3, ["a"] * 8):
        x.normal_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            prepare(backend, forward_batch(ids), "decode")
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        base = base_of(layer, x)
        check(y, base, x, ids + [None] * (8 - len(ids)), adapters, widths)


@pytest.mark.cuda_only
def test_a_prefill_takes_no_synchronisation(serving, device):  # noqa: F811
    backend = make_backend(serving())
    layer, _, _ = make_linear("qkv", backend, torch.bfloat16)
    head, _ = make_head(backend, torch.bfloat16)
    x = torch.randn(sum(LENGTHS), K)
    for first in (True, False):
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            prepare(backend, forward_batch(MIXED, LENGTHS))
            layer(x)
            head(x[: len(MIXED)])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda_only
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["decode", "extend"])
def test_like_csgmv(serving, device, name, lengths):  # noqa: F811
    """SGLang's own kernels on the same pool: as far apart as two roundings put them. Zeros in the padding, which
    they read."""
    if not sglang_source.has_sglangs_kernels():
        pytest.skip("SGLang's kernels need Triton")
    published = serving()
    backends = [make_backend(published), ChunkedSgmvLoRABackend(SLOTS, torch.device(device), published)]
    layer, widths, _ = make_linear(name, backends[0], torch.bfloat16)
    layer.lora_a.nan_to_num_(0), layer.lora_b.nan_to_num_(0)
    batch = forward_batch(MIXED, lengths)
    if lengths is not None:
        batch.extend_seq_lens = torch.tensor(lengths, dtype=torch.int32)
    x = torch.randn(len(rows_of(batch)), K)
    results = []
    for backend in backends:
        layer.lora_backend = backend
        with torch.device("cpu"):  # where csgmv, which names no device, pins its tensors
            prepare(backend, batch)
        results.append(layer(x)[0].double())
    base = base_of(layer, x).double()
    ours, theirs = results
    scale = theirs.abs() + (theirs - base).abs().amax(1, keepdim=True)
    assert ((ours - theirs).abs() <= 4 * EPS[torch.bfloat16] * scale).all()
    assert (theirs - base).norm() > 0.12 * theirs.norm()
