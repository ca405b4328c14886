"""vLLM's LoRA manager on polylora's wrapper: it wraps a model of vLLM's layers, loads adapters, evicts, maps rows."""

from __future__ import annotations

import importlib.metadata
from collections import OrderedDict
from unittest.mock import MagicMock

import pytest
import torch
import vllm_source
from torch import nn

try:
    importlib.metadata.version("cachetools")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("cachetools is not installed, which vLLM's LoRA manager works with", allow_module_level=True)
vllm_source.require_vllm()

import vllm.platforms  # noqa: E402
from polylora.vllm_plugin.activation import AfterFused  # noqa: E402
from polylora_vllm import WRAPPER  # noqa: E402
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.lora_weights import LoRALayerWeights  # noqa: E402
from vllm.lora.model_manager import LoRAModelManager  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: E402
from vllm.model_executor.models.interfaces import SupportsLoRA  # noqa: E402
from vllm.model_executor.models.llama import LlamaMLP  # noqa: E402

DTYPE, VOCAB, HIDDEN, INTER = torch.bfloat16, 96, 32, 48
# name in the adapter: outputs, inputs
SHAPES = {"embed": (HIDDEN, VOCAB), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER), "gate": (INTER, HIDDEN)}


class TinyModel(nn.Sequential, SupportsLoRA):
    packed_modules_mapping = {"gate_up": ["gate", "up"]}
    embedding_modules = {"embed": "input_embeddings"}
    is_3d_moe_weight = is_non_gated_moe = False

    def forward(self, ids):
        """The values before and after each layer: ``(module, x, y)``."""
        steps, h = [], ids
        for name in ("embed", "gate_up", "down"):
            y = getattr(self, name)(h)
            y = y[0] if isinstance(y, tuple) else y
            steps.append((name, h, y))
            h = y[:, :INTER] if name == "gate_up" else y
        return steps


class GatedModel(nn.Module, SupportsLoRA):
    """One of vLLM's own gated MLPs."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    embedding_modules = {}
    is_3d_moe_weight = is_non_gated_moe = False

    def __init__(self):
        super().__init__()
        self.mlp = LlamaMLP(HIDDEN, INTER, "silu")


@pytest.fixture
def engine(device, monkeypatch, tmp_path):
    """vLLM's configuration and ranks, as far as layers and managers ask for them."""
    torch.manual_seed(0)
    platform = type(vllm.platforms.current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda cls: WRAPPER))
    config = VllmConfig(device_config=DeviceConfig(device=device))
    dtype = torch.get_default_dtype()
    with set_current_vllm_config(config):
        backend = "gloo" if device == "cpu" else "nccl"
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path / 'ranks'}", 0, backend=backend)
        parallel_state.initialize_model_parallel(1, 1)
        torch.set_default_dtype(DTYPE)
        try:
            yield config
        finally:
            torch.set_default_dtype(dtype)
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


@pytest.fixture
def manager(engine, device):
    """Two slots of rank 16 over an embedding, a fused gate_up and a row-parallel linear, on one rank."""
    with torch.device(device):
        layers = OrderedDict(
            embed=VocabParallelEmbedding(VOCAB, HIDDEN),
            gate_up=MergedColumnParallelLinear(HIDDEN, [INTER, INTER], bias=False),
            down=RowParallelLinear(INTER, HIDDEN, bias=False),
            unused=ColumnParallelLinear(HIDDEN, HIDDEN, bias=False),
        )
    return make_manager(TinyModel(layers), engine, device)


def make_manager(model, config, device):
    model.config = MagicMock()
    for weight in model.parameters():
        weight.data.copy_(torch.randn(weight.shape) / weight.size(-1) ** 0.5)
    lora = LoRAConfig(max_lora_rank=16, max_loras=2, max_cpu_loras=4, lora_dtype=DTYPE)
    return LoRAModelManager(model, 8, 64, VOCAB, lora, torch.device(device), config)


def adapter(adapter_id, rank, names, alpha=16):
    """vLLM's adapter and its A and scaled B by name."""
    weights, layers = {}, {}
    for name in names:
        out, k = SHAPES[name]
        a, b = (torch.randn(rank, k) / k**0.5).to(DTYPE), torch.randn(out, rank).to(DTYPE)
        layers[name] = LoRALayerWeights(name, rank, alpha, a, b)
        weights[name] = a, b * (alpha / rank)  # a power of two here: exact
    return LoRAModel(adapter_id, rank, layers), weights


def base_of(manager, name, x):
    base = getattr(manager.model, name).base_layer
    y = base(x)
    return y[0] if isinstance(y, tuple) else y


def served(name, weights):
    return set(TinyModel.packed_modules_mapping.get(name, [name])) & set(weights)


def check(manager, ids, loaded):
    """A step of these adapters, layer by layer: each layer's delta against float64, of what went into it."""
    mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
    manager.set_adapter_mapping(mapping)
    device = manager.model.gate_up.lora_a_stacked[0].device
    tokens = torch.randint(VOCAB, (len(ids) + 2,)).to(device)  # two rows of padding
    for name, x, y in manager.model(tokens):
        base = base_of(manager, name, x)
        want = base.double()
        for row, i in enumerate(ids):
            for s, part in enumerate(TinyModel.packed_modules_mapping.get(name, [name])):
                if i and part in loaded[i]:
                    a, b = (w.to(device).double() for w in loaded[i][part])
                    v = a[:, x[row]] if name == "embed" else a @ x[row].double()
                    want[row, s * b.size(0) : (s + 1) * b.size(0)] += b @ v
        with_lora = torch.tensor([bool(i and served(name, loaded[i])) for i in ids] + [False, False])
        if with_lora.any():
            assert (want - base.double())[with_lora].norm() > 0.12 * want[with_lora].norm()
        assert torch.equal(y[~with_lora], base[~with_lora])
        size = want.abs() + (want - base.double()).abs()  # a delta beside the base's GEMM is rounded, too
        bound = 2**-8 * size if device.type == "cpu" else 2**-7 * size + 0.1
        assert ((y.double() - want).abs() <= bound + 1e-5).all(), name


def ranks(manager):
    return {
        name: layer._polylora_table.words()[:, :, 1].tolist()
        for name, layer in manager.modules.items()
        if name != "unused"
    }


def test_adapters_come_and_go(manager):
    assert set(manager.modules) == {"embed", "gate_up", "down", "unused"}
    adapters = {
        1: adapter(1, 8, ("embed", "gate", "up", "down")),
        2: adapter(2, 4, ("up",)),
        3: adapter(3, 16, ("embed", "down")),
    }
    loaded = {i: weights for i, (_, weights) in adapters.items()}
    for model, _ in adapters.values():
        manager.add_adapter(model)
    manager.activate_adapter(1)
    manager.activate_adapter(2)
    assert ranks(manager) == {"embed": [[8], [0]], "gate_up": [[8, 8], [0, 4]], "down": [[8], [0]]}
    check(manager, [1, 0, 2, 2, 1], loaded)
    check(manager, [0, 0], loaded)
    check(manager, [2] * 7, loaded)
    manager.deactivate_adapter(1)
    manager.activate_adapter(3)  # in slot 0
    assert ranks(manager) == {"embed": [[16], [0]], "gate_up": [[0, 0], [0, 4]], "down": [[16], [0]]}
    check(manager, [2, 3, 0, 3], loaded)
    with pytest.raises(KeyError, match="number 1 is in no slot"):
        check(manager, [1], loaded)


@pytest.mark.parametrize("rows", [3, 80])
def test_the_activation_of_a_gated_mlp_is_one_with_its_deltas(engine, device, rows):
    """vLLM's own MLP, wrapped by its manager: gate, up and down, each with its adapter."""
    with torch.device(device):
        model = GatedModel()
    manager = make_manager(model, engine, device)
    assert isinstance(model.mlp.act_fn, AfterFused)
    shapes = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
    layers, weights = {}, {}
    for name, (out, k) in shapes.items():
        a, b = (torch.randn(8, k) / k**0.5).to(DTYPE), torch.randn(out, 8).to(DTYPE)
        layers[f"mlp.{name}"] = LoRALayerWeights(f"mlp.{name}", 8, 8, a, b)
        weights[name] = a.to(device).double(), b.to(device).double()
    manager.add_adapter(LoRAModel(1, 8, layers))
    manager.activate_adapter(1)
    ids = [i % 2 for i in range(rows)]
    manager.set_adapter_mapping(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True))
    x = torch.randn(rows, HIDDEN).to(DTYPE).to(device)
    got, mlp = model.mlp(x).double(), model.mlp
    with_lora = torch.tensor(ids, dtype=torch.bool)

    def linear(layer, x, *names):
        y = x.double() @ layer.base_layer.weight.double().T
        plain = y.clone()
        deltas = [x.double() @ weights[name][0].T @ weights[name][1].T for name in names]
        y[with_lora] += torch.cat(deltas, 1)[with_lora]
        return y, plain

    def activated(y):
        gate, up = y.chunk(2, 1)
        return nn.functional.silu(gate) * up

    y, plain = linear(mlp.gate_up_proj, x, "gate_proj", "up_proj")
    want, _ = linear(mlp.down_proj, activated(y), "down_proj")
    assert (got - want).norm() < 2e-2 * want.norm()
    bypassed, _ = linear(mlp.down_proj, activated(plain), "down_proj")
    assert (bypassed - want)[with_lora].norm() > 0.3 * want[with_lora].norm()


def test_dummies_as_for_graph_capture(manager):
    """vLLM captures with adapters of zeros, of a lower rank than those that come later."""
    for i in (1, 2):
        manager.add_adapter(manager.create_dummy_lora(i, 8, TinyModel.embedding_modules))
        manager.activate_adapter(i)
    assert ranks(manager)["gate_up"] == [[8, 8], [8, 8]]
    check(manager, [1, 2, 2, 1], {1: {}, 2: {}})
