"""SGLang's LoRA manager on polylora's backend: it wraps a model of SGLang's layers, loads adapters, evicts, unloads."""

from __future__ import annotations

import types

import pytest
import sglang_source
import torch
from sglang_source import forward_batch, serving  # noqa: F401  (a fixture)
from torch import nn

sglang_source.require_sglang()

import polylora_sglang  # noqa: E402
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear  # noqa: E402
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402
from sglang.srt.lora import lora_manager  # noqa: E402
from sglang.srt.lora.lora_manager import LoRAManager  # noqa: E402
from sglang.srt.lora.lora_registry import LoRARef  # noqa: E402

HEADS, KV_HEADS, HEAD, HIDDEN, INTER, VOCAB, LAYERS = 4, 2, 8, 32, 48, 90, 2
EPS = 2**-8
# name in the adapter: outputs, inputs
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN), "mlp.down_proj": (HIDDEN, INTER),
}  # fmt: skip
FUSED = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
CONFIG = types.SimpleNamespace(
    num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    head_dim=HEAD, intermediate_size=INTER, vocab_size=VOCAB,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False)
        self.self_attn.o_proj = RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False)
        self.mlp.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [INTER] * 2, bias=False)
        self.mlp.down_proj = RowParallelLinear(INTER, HIDDEN, bias=False)


class TinyModel(nn.Module):
    config = CONFIG

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.2)

    def layers(self):
        """(name in the adapter of each slice, layer) of every layer with LoRA."""
        yield ["embed_tokens"], self.model.embed_tokens
        for i, block in enumerate(self.model.layers):
            for name, slices in FUSED.items():
                yield [f"layers.{i}.{s}" for s in slices], block.get_submodule(name)
        yield ["lm_head"], self.lm_head


@pytest.fixture
def manager(serving, monkeypatch):  # noqa: F811
    """Three slots of rank 16: one adapter more than they hold beside the base model can be loaded on the host."""
    monkeypatch.setattr(lora_manager, "get_available_gpu_memory", lambda *args: 0.0)
    polylora_sglang.register()
    server_args = serving(max_loras_per_batch=3, max_lora_rank=16)
    manager = LoRAManager(
        TinyModel(), CONFIG, 3, None, torch.bfloat16, server_args,
        lora_backend="polylora", max_lora_rank=16, target_modules=TARGETS,
    )  # fmt: skip
    assert type(manager.lora_backend).__name__ == "PolyloraLoRABackend"
    return manager


def adapter(manager, uid, rank, alpha, leave_out=()):
    """Loads a random adapter as SGLang does from tensors; returns each module's A and B, and the scale."""
    shapes = {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEARS.items()}
    shapes = {**shapes, "lm_head": (VOCAB, HIDDEN), "embed_tokens": (HIDDEN, VOCAB)}
    weights, tensors = {}, {}
    for name, (outputs, inputs) in shapes.items():
        if any(part in name for part in leave_out):
            continue
        a, b = torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank)
        weights[name] = a, b
        halves = [f"lora_embedding_{h}" if name == "embed_tokens" else f"lora_{h}.weight" for h in "AB"]
        prefix = "base_model.model." if name == "lm_head" else "base_model.model.model."
        for half, tensor in zip(halves, (a, b), strict=True):
            tensors[f"{prefix}{name}.{half}"] = tensor
    targets = [t for t in TARGETS if t not in leave_out]
    config = {"peft_type": "LORA", "target_modules": targets, "r": rank, "lora_alpha": alpha}
    ref = LoRARef(lora_id=uid, lora_name=uid, lora_path=uid, pinned=False)
    result = manager.load_lora_adapter_from_tensors(ref, tensors, config)
    assert result.success, result.error_message
    return weights, alpha / rank


def check(manager, ids, adapters, lengths=None, tokens=None, graph=False):
    """One pass over every layer, each on an input of its own: rows with an adapter against float64, others bit for bit.

    Args:
        ids: of each request; lengths: rows of each (None: decode); tokens: rows of the pass (padded in a graph).
    """
    manager.fetch_new_loras(set(ids))
    batch = forward_batch(ids, lengths)
    manager.prepare_lora_batch(batch)
    assert manager.lora_backend.batch_info.use_cuda_graph == graph
    rows = [uid for uid, n in zip(ids, lengths or [1] * len(ids), strict=True) for _ in range(n)]
    for names, layer in manager.base_model.layers():
        head = names == ["lm_head"]
        of_rows = ids if head and lengths is not None else rows
        count = len(of_rows) if head and lengths is not None else tokens or len(rows)
        embedding = names == ["embed_tokens"]
        inputs = {"o_proj": HEADS * HEAD, "down_proj": INTER}.get(names[0].split(".")[-1], HIDDEN)
        x = torch.randint(VOCAB, (count,)) if embedding else torch.randn(count, inputs)
        got, base = (first(layer(x)) for layer in (layer, without_lora(layer)))
        want, worth = base.double().clone(), torch.zeros_like(base, dtype=torch.float64)
        for row, uid in enumerate(of_rows):
            begin = 0
            for name in names:
                weights, scale = adapters[uid] if uid is not None else ({}, 0)
                outputs = width(name)
                if name in weights:
                    a, b = (w.double() for w in weights[name])
                    v = a[:, x[row]] if embedding else a @ x[row].double()
                    want[row, begin : begin + outputs] += scale * (b @ v)
                    worth[row, begin : begin + outputs] = scale * (b.abs() @ v.abs())
                begin += outputs
        assert torch.equal(got[worth == 0], base[worth == 0]), names
        bound = want.abs() + (worth if got.is_cuda else 0) + 1e-3
        assert ((got.double() - want).abs() <= EPS * bound).all(), names
        if worth.any():
            assert (want - base.double()).norm() > 0.12 * want.norm()


def without_lora(layer):
    def run(x):
        layer.set_lora = False
        y = layer(x)
        layer.set_lora = True
        return y

    return run


def first(y):
    return y[0] if isinstance(y, tuple) else y


def width(name: str) -> int:
    return {"lm_head": VOCAB, "embed_tokens": HIDDEN}.get(name) or LINEARS[name.split(".", 2)[-1]][0]


def test_adapters_of_mixed_ranks(manager):
    adapters = {"a": adapter(manager, "a", 16, 8), "b": adapter(manager, "b", 3, 12)}
    check(manager, ["a", None, "b", "b"], adapters)
    check(manager, ["b", "a", None], adapters, lengths=[3, 1, 5])
    check(manager, [None, None], adapters)


def test_an_adapter_that_leaves_modules_out(manager):
    """SGLang fills its slot with zeros there: k alone, and whole modules."""
    adapters = {"a": adapter(manager, "a", 16, 16), "b": adapter(manager, "b", 5, 10, leave_out=("o_proj", "k_proj"))}
    check(manager, ["a", "b", None], adapters)


def test_eviction_and_unloading(manager):
    """Slots change hands: of another rank and scale, of the same ones, and of none."""
    adapters = {"a": adapter(manager, "a", 16, 8), "b": adapter(manager, "b", 3, 12), "c": adapter(manager, "c", 5, 5)}
    for ids in (["a", "b"], ["c", "a"], ["b", "c"], [None, "a"], ["c", None, "b"]):
        check(manager, ids, adapters)
    gone = LoRARef(lora_id="b", lora_name="b", lora_path="b", pinned=False)
    assert manager.unload_lora_adapter(gone).success
    check(manager, ["c", None], adapters)
    adapters["d"] = adapter(manager, "d", 8, 16)
    check(manager, ["d", "c", None], adapters)


def test_graphs(manager):
    """Decode's and prefill's: what is behind a batch keeps the base's bits, and addresses stay."""
    manager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=8, num_tokens_per_req=1)
    manager.init_prefill_cuda_graph_batch_info(max_num_tokens=16, max_num_requests=4)
    adapters = {"a": adapter(manager, "a", 16, 8), "b": adapter(manager, "b", 3, 12)}
    addresses = set()
    for ids in ([None] * 8, ["a", None, "b"], ["b"] * 8, [None]):
        check(manager, ids, adapters, tokens=8, graph=True)
        addresses.add(manager.lora_backend.batch_info.rows.slots.data_ptr())
    assert len(addresses) == 1
    check(manager, ["a", None, "b"], adapters, lengths=[7, 2, 1], tokens=16, graph=True)
    check(manager, ["a", None, "b"], adapters, lengths=[9, 9, 9], graph=False)  # longer than any graph
    tables = {key: t.table.data_ptr() for key, t in manager.lora_backend.tables._tables.items()}
    adapters["c"] = adapter(manager, "c", 5, 5)
    check(manager, ["c", None, "b"], adapters, tokens=8, graph=True)
    assert tables == {key: t.table.data_ptr() for key, t in manager.lora_backend.tables._tables.items()}


def test_tables_are_made_before_the_first_pass(manager):
    """One a shape of layers: a captured graph could not make them."""
    manager.fetch_new_loras({None})
    manager.prepare_lora_batch(forward_batch([None]))
    assert len(manager.lora_backend.tables._tables) == 6  # qkv, o, gate_up, down, embedding, lm_head
    assert len(manager.lora_backend.tables._weights) == 4 * LAYERS + 2
