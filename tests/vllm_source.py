"""vLLM's own Python files, imported where vLLM is not installed, with stand-ins for what they cannot have there.

``POLYLORA_VLLM_SOURCE`` names an unpacked source distribution of vLLM, or the folder that it is installed in. What
stands in for what:

- packages that are not installed and that its LoRA layers never call (web clients, serialisers), and vLLM's own HTTP
  front end: empty modules;
- the Triton kernels ``lora_shrink`` and ``lora_expand``: the same in torch, from the metadata that they are given (on
  a GPU they are themselves);
- pinned memory, where there is no GPU: ordinary memory;
- base layers: their GEMM, without tensor parallelism;
- what vLLM's Triton experts launch (GEMMs, activations, the top-k sum), where there is no GPU: the same in torch.

Everything else, the layers with LoRA, their set_lora, the wrapper that ours inherits from and the forward context, is
vLLM's.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

SOURCE = os.environ.get("POLYLORA_VLLM_SOURCE")
MISSING = (
    "aiohttp", "cachetools", "cbor2", "cloudpickle", "cpuinfo", "einops", "fastapi", "llguidance", "msgspec", "openai",
    "openai_harmony", "partial_json_parser", "prometheus_client", "pybase64", "requests", "urllib3", "uvloop",
    "xgrammar", "zmq",
)  # fmt: skip
FRONT_END = ("vllm.entrypoints", "vllm.parser", "vllm.reasoning", "vllm.tool_parsers")


def require_vllm() -> None:
    """Makes ``import vllm`` work, from the source tree; skips the module that calls it where there is none."""
    if SOURCE is None:
        pytest.skip("POLYLORA_VLLM_SOURCE names no source tree of vLLM", allow_module_level=True)
    if "vllm" not in sys.modules:
        assert (Path(SOURCE) / "vllm/lora/punica_wrapper/punica_gpu.py").is_file(), SOURCE
        sys.path.insert(0, SOURCE)
        sys.meta_path.insert(0, StandIns(FRONT_END))
        sys.meta_path.append(StandIns(MISSING))
    if not torch.cuda.is_available():
        importlib.import_module("vllm.utils.torch_utils").PIN_MEMORY = False
    punica_gpu = importlib.import_module("vllm.lora.punica_wrapper.punica_gpu")
    metadata = importlib.import_module("vllm.lora.ops.triton_ops.lora_kernel_metadata")
    punica_gpu.LoRAKernelMeta = metadata.LoRAKernelMeta
    for stand_in in (lora_shrink, lora_expand):
        vllms = getattr(punica_gpu, stand_in.__name__, None)
        if not hasattr(vllms, "counted"):
            setattr(punica_gpu, stand_in.__name__, counted(stand_in, vllms))


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for some names and whatever is below them."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if not any(f"{name}.".startswith(f"{top}.") for top in self.names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


class Anything:
    """A base class, a generic, a function, whatever an import or a class body makes of it."""

    def __init_subclass__(cls, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        return {"type": "any"}

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self


class StandIn(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Anything,), {}) if name[0].isupper() else Anything()
        setattr(self, name, value)
        return value


# ------------------------------------------------------------------------------------------------ what its tests share

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=list(EPS), ids=["bf16", "fp16"])
def half(request) -> torch.dtype:
    return request.param


def note_calls(monkeypatch, names, note=lambda name, *args: name) -> list:
    """What ``note`` makes of the name and arguments of each of polylora's ops ``names``, as they are called."""
    notes, running = [], []

    def noting(name, op):
        def call(*args):
            if running:  # torch looks an op up by its name once more where a default device is set
                return op(*args)
            notes.append(note(name, *args))
            running.append(name)
            try:
                return op(*args)
            finally:
                running.clear()

        return call

    ops = torch.ops.polylora
    for name in names:
        monkeypatch.setattr(ops, name, noting(name, getattr(ops, name)))
    return notes


# ------------------------------------------------------------------------------------- vLLM's kernels, in plain torch

#: Names of the kernels that ran.
calls: list[str] = []


def counted(stand_in, kernel):
    """The stand-in on the CPU, vLLM's kernel on a GPU; either is written down in :data:`calls`."""

    def call(x, *args, **kwargs):
        calls.append(stand_in.__name__)
        (kernel if x.is_cuda else stand_in)(x, *args, **kwargs)

    call.counted = True
    return call


def groups(order, counts, starts, active, no_lora):
    """(slot, row indices) of each group that has an adapter, as the Triton kernels walk them."""
    if no_lora.item():
        return
    for at, slot in enumerate(active.tolist()):
        if slot >= 0:
            begin = int(starts[at])
            yield slot, order[begin : begin + int(counts[at])].long()


def lora_shrink(x, weights, y, mapping, order, counts, starts, active, no_lora, num_active, scale) -> None:
    assert mapping.size(0) == order.size(0) == x.size(0) and active.size(0) == counts.size(0) == starts.size(0) - 1
    if not no_lora.item():
        y.zero_()
    for slot, rows in groups(order, counts, starts, active, no_lora):
        for s, a in enumerate(weights):
            y[s, rows] = scale * x[rows].float() @ a[slot, 0].float().T


def lora_expand(
    x, weights, y, mapping, order, counts, starts, active, no_lora, num_active, offset_start=0, add_inputs=False
) -> None:
    assert mapping.size(0) == order.size(0) == x.size(1)
    for slot, rows in groups(order, counts, starts, active, no_lora):
        begin = offset_start
        for s, b in enumerate(weights):
            columns = slice(begin, begin + b.size(2))
            delta = x[s, rows].float() @ b[slot, 0].float().T
            y[rows, columns] = (delta + (y[rows, columns].float() if add_inputs else 0)).to(y.dtype)
            begin += b.size(2)


# --------------------------------------------------------------------------------------------------------- base layers


class PlainGemm:
    """A quantisation method that does not quantise."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias).to(getattr(layer, "out_dtype", x.dtype))


def base_embedding(vocab: int, dim: int, dtype: torch.dtype) -> nn.Module:
    """vLLM's embedding on one rank, of random weights."""
    embedding = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding").VocabParallelEmbedding

    class Base(embedding):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.embedding(ids, self.weight)

    base = Base()
    base.weight = nn.Parameter(torch.randn(vocab, dim).to(dtype), requires_grad=False)
    base.num_added_embeddings_per_partition, base.org_vocab_size, base.embedding_dim = 0, vocab, dim
    return base


class PlainHead:
    """What LogitsProcessorWithLoRA asks of the base's logits processor. ``dtype``: of the logits."""

    def __init__(self, vocab: int, weight: Tensor, dtype: torch.dtype):
        self.vocab_size, self.weight, self.dtype = vocab, weight, dtype

    def _apply_head(self, lm_head, x: Tensor, bias) -> Tensor:
        return nn.functional.linear(x.to(self.dtype), self.weight.to(self.dtype))

    def _gather_logits(self, logits: Tensor) -> Tensor:
        return logits


def base_linear(kind: str, k: int, widths: list[int], dtype: torch.dtype, **attributes) -> nn.Module:
    """One of vLLM's linear classes on one rank, of random weights ``[sum of widths, k]``."""
    linear = importlib.import_module("vllm.model_executor.layers.linear")

    class Base(getattr(linear, kind)):
        def __init__(self):
            nn.Module.__init__(self)

    base = Base()
    base.weight = nn.Parameter(torch.randn(sum(widths), k).to(dtype) / k**0.5, requires_grad=False)
    sizes = {"input_size": k, "output_size": sum(widths), "output_sizes": list(widths), "tp_size": 1, "tp_rank": 0}
    shards = {"input_size_per_partition": k, "output_size_per_partition": sum(widths)}
    flags = {"skip_bias_add": False, "return_bias": False, "gather_output": False, "input_is_parallel": True}
    rest = {"bias": None, "reduce_results": False, "quant_method": PlainGemm(), "prefix": "base"}
    values = {**sizes, **shards, **flags, **rest, **attributes}
    for name, value in values.items():
        setattr(base, name, value)
    Base.__name__ = kind
    return base


# ------------------------------------------------------------------------------------------------------------- experts


def moe_config(experts, local, top_k, hidden, inner, activation: str, dtype: torch.dtype):
    """vLLM's description of an MoE layer on one rank, of ``local`` out of ``experts`` experts."""
    config = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
    acts = importlib.import_module("vllm.model_executor.layers.fused_moe.activation").MoEActivation
    parallel = config.FusedMoEParallelConfig.make_no_parallel()
    return config.FusedMoEConfig(
        num_experts=experts, experts_per_token=top_k, hidden_dim=hidden, intermediate_size=inner,
        num_local_experts=local, num_logical_experts=experts, activation=acts.from_str(activation),
        device=torch.get_default_device(), routing_method=config.RoutingMethodType.TopK, moe_parallel_config=parallel,
        in_dtype=dtype,
    )  # fmt: skip


def base_experts(config) -> nn.Module:
    """What FusedMoEWithLoRA asks of vLLM's MoE runner: random weights in vLLM's modular kernel of Triton experts."""
    layers = "vllm.model_executor.layers.fused_moe"
    kernel = importlib.import_module(f"{layers}.modular_kernel").FusedMoEKernel
    prepare = importlib.import_module(f"{layers}.prepare_finalize").MoEPrepareAndFinalizeNoDPEPModular
    triton = importlib.import_module(f"{layers}.experts.triton_moe").TritonExperts
    unquantised = importlib.import_module(f"{layers}.config").FUSED_MOE_UNQUANTIZED_CONFIG
    hidden, inner, local = config.hidden_dim, config.intermediate_size_per_partition, config.num_local_experts
    width = inner * (2 if config.is_act_and_mul else 1)

    class Method:
        supports_internal_mk, is_monolithic, moe_quant_config = True, False, unquantised
        moe_kernel = kernel(prepare(), triton(config, unquantised))

    class Routed(nn.Module):
        quant_method = Method()

        def _ensure_moe_quant_config_init(self):
            pass

    class Base(nn.Module):
        _shared_experts, moe_config, _quant_method = None, config, Routed.quant_method

        def _replace_quant_method(self, method):
            pass

    base = Base()
    base.routed_experts = Routed()
    w1, w2 = torch.randn(local, width, hidden) / hidden**0.5, torch.randn(local, hidden, inner) / inner**0.5
    for name, weight in (("w13_weight", w1), ("w2_weight", w2)):
        weight = nn.Parameter(weight.to(config.in_dtype), requires_grad=False)
        setattr(base.routed_experts, name, weight)
    return base


def plain_experts(monkeypatch) -> None:
    """Lets vLLM's Triton experts run on the CPU."""
    triton = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.triton_moe")
    modular = importlib.import_module("vllm.model_executor.layers.fused_moe.modular_kernel")
    config = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
    # Experts without a gate ask for it.
    platform = types.SimpleNamespace(is_cuda_alike=lambda: True, fp8_dtype=lambda: torch.float8_e4m3fn)
    monkeypatch.setattr(config, "current_platform", platform)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # by its manager of workspaces
    monkeypatch.setattr(triton, "tl", types.SimpleNamespace(bfloat16=None, float16=None, float32=None))
    monkeypatch.setattr(triton, "try_get_optimal_moe_config", lambda *args, **kwargs: {"BLOCK_SIZE_M": 16})
    monkeypatch.setattr(triton, "_prepare_expert_assignment", assignment)
    monkeypatch.setattr(triton, "invoke_fused_moe_triton_kernel", experts_gemm)
    monkeypatch.setattr(triton.ops, "moe_sum", lambda x, out, *held: out.copy_(x.float().sum(1)))
    monkeypatch.setattr(modular, "apply_moe_activation", lambda act, out, x, **rest: out.copy_(activated(act, x)))


def assignment(topk_ids, config, tokens, top_k, experts, expert_map=None, **kwargs):
    """The local expert of each pair, instead of sorted and aligned ids."""
    ids = topk_ids.flatten().long()
    return ids if expert_map is None else expert_map[ids].long(), None, None


def experts_gemm(x, w, y, x_scale, w_scale, topk_weights, ids, expert_ids, padded, weighted, top_k, config, **kwargs):
    calls.append("experts_gemm")
    rows = x.float()[torch.arange(ids.numel()) // top_k]
    out = torch.einsum("pnk,pk->pn", w.float()[ids.clamp(min=0)], rows)
    out = torch.where((ids >= 0).unsqueeze(1), out, 0.0)  # whatever x holds there
    y.copy_((out * topk_weights.flatten().unsqueeze(1) if weighted else out).view(y.shape))


def activated(act, x: Tensor) -> Tensor:
    """vLLM's activation of ``x [rows, N]``, by the name of it."""
    name, x = act.value, x if x.dtype == torch.float64 else x.float()
    if name == "swigluoai":
        gate, up = x[:, ::2].clamp(max=7.0), x[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    plain = name.removesuffix("_no_mul")
    f = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "relu2": lambda x: nn.functional.relu(x) ** 2,
    }[plain]
    if plain != name:
        return f(x)
    gate, up = x.chunk(2, dim=1)
    return f(gate) * up
