"""Gated MLPs of vLLM whose activation is one with the deltas of gate and up, against float64."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import pytest
import torch
import vllm_source
from torch import Tensor, nn

vllm_source.require_vllm()

from polylora.vllm_plugin import activation, ops, tables  # noqa: E402
from polylora.vllm_plugin.wrapper import PolyloraPunicaWrapper  # noqa: E402
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora import layers as vllm_layers  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul, SwigluOAIAndMul  # noqa: E402
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # noqa: E402

SLOTS, RANK, K, INNER = 4, 16, 64, 72
EPS, half = vllm_source.EPS, vllm_source.half
ACTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "silu": (SiluAndMul, nn.functional.silu),
    "gelu": (GeluAndMul, nn.functional.gelu),
    "gelu_tanh": (lambda: GeluAndMul("tanh"), lambda x: nn.functional.gelu(x, approximate="tanh")),
}
ROWS = (3, ops.BESIDE_ROWS, ops.BESIDE_ROWS + 1, 200)


@pytest.fixture(autouse=True)
def here(device):
    """New tensors are made on the device of the test, layers under a configuration of vLLM's."""
    torch.manual_seed(0)
    tables._said.clear()
    vllm_source.calls.clear()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device=device))):
        torch.set_default_device(None if device == "cpu" else device)
        yield
        torch.set_default_device(None)


class Mlp(nn.Module):
    """As vLLM's models have it, but for down: what reaches it is the result."""

    def __init__(self, gate_up: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.act_fn = gate_up, act

    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        x = self.act_fn(gate_up)
        return x


class Setting:
    """An MLP with adapters 1, 2 (no up) and 3 in slots 2, 0 and 3; ``model`` holds it."""

    RANKS = {1: (16, 16), 2: (8, 0), 3: (5, 5)}
    SLOT_IDS = [2, None, 1, 3]

    def __init__(
        self, dtype=torch.bfloat16, act="silu", mlp=Mlp, inner=INNER, tokens=256, room=RANK, **attributes
    ) -> None:
        self.f, self.inner = ACTS.get(act, (None, None))[1], inner
        config = LoRAConfig(max_lora_rank=room, max_loras=SLOTS, lora_dtype=dtype)
        self.wrapper = PolyloraPunicaWrapper(tokens, 16, torch.get_default_device(), lora_config=config)
        base = vllm_source.base_linear(
            "MergedColumnParallelLinear", K, [inner, inner], dtype, **{"return_bias": True} | attributes
        )
        self.layer = vllm_layers.MergedColumnParallelLinearWithLoRA(base)
        self.layer.create_lora_weights(SLOTS, config)
        self.layer.set_mapping(self.wrapper)
        act_fn = ACTS[act][0]() if act in ACTS else act()
        self.model = nn.ModuleList([mlp(self.layer, act_fn)])
        activation.fuse_activations(self.model, PolyloraPunicaWrapper)
        self.weights = {}
        for number, ranks in self.RANKS.items():
            a = [(torch.randn(r, K) / K**0.5).to(dtype) if r else None for r in ranks]
            b = [torch.randn(inner, r).to(dtype) if r else None for r in ranks]
            self.weights[number] = a, b
            self.layer.set_lora(self.SLOT_IDS.index(number), a, b)

    @property
    def mlp(self) -> nn.Module:
        return self.model[0]

    @property
    def is_fused(self) -> bool:
        return isinstance(self.mlp.act_fn, activation.AfterFused)

    def step(self, ids) -> None:
        self.wrapper.update_metadata(LoRAMapping(tuple(ids), (), is_prefill=True), self.SLOT_IDS, SLOTS + 1, 40)

    def base(self, x: Tensor) -> Tensor:
        return self.layer.base_layer.quant_method.apply(self.layer.base_layer, x, self.layer.base_layer.bias)

    def vllms(self, y: Tensor) -> Tensor:
        """vLLM's own activation, in the kernel that is behind it without a compiler."""
        act = self.mlp.act_fn.vllms
        return act.forward_cuda(y) if y.is_cuda else act.forward_native(y)

    def check(self, h: Tensor, x: Tensor, ids, apart: bool = False) -> None:
        """Of each row: the activation of the base's 16-bit outputs and the deltas. And the deltas must be seen.

        ``apart``: the sum and vLLM's own activation, which rounds what it multiplies up with.
        """
        h, x = h.reshape(-1, h.size(-1)), x.reshape(-1, x.size(-1))
        y = self.base(x)
        want, plain, slack = y.double(), y.double(), torch.zeros(len(x), 2 * self.inner, dtype=torch.float64)
        for row, number in enumerate(ids):
            for s, (a, b) in enumerate(zip(*self.weights[number], strict=True)) if number > 0 else ():
                if a is not None:
                    v, at = a.double() @ x[row].double(), slice(s * self.inner, (s + 1) * self.inner)
                    want[row, at] += b.double() @ v
                    # x A^T and the delta are rounded once each
                    slack[row, at] = b.double().abs() @ v.abs() + (b.double() @ v).abs()
        if apart:
            slack += 2 * want.abs()
        (gate, up), (gate_slack, up_slack) = want.chunk(2, 1), slack.chunk(2, 1)
        right = self.f(gate) * up
        eps = EPS[h.dtype]
        # every activation here has slopes below 1.13
        bound = eps * (right.abs() + 1.13 * gate_slack * up.abs() + self.f(gate).abs() * up_slack) + 1e-3
        error = (h.double() - right).abs()
        assert h.shape == right.shape and (error <= bound).all(), (error - bound).max()
        if any(number > 0 for number in ids):
            without = self.f(plain[:, : self.inner]) * plain[:, self.inner :]
            assert (right - without).norm() > 0.1 * right.norm()


def ids_of(rows: int) -> list[int]:
    return [(1, 0, 2, 3, 3, 0, 1)[i % 7] for i in range(rows)]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_adapters_and_of_none(half, act, rows):
    setting = Setting(half, act)
    assert setting.is_fused
    setting.step(ids_of(rows))
    x = torch.randn(rows, K).to(half)
    setting.check(setting.mlp(x), x, ids_of(rows))


@pytest.mark.parametrize("rows", ROWS)
def test_a_step_without_lora_has_vllms_own_activation(half, rows):
    setting = Setting(half)
    setting.step([0] * rows)
    x = torch.randn(rows, K).to(half)
    assert torch.equal(setting.mlp(x), setting.vllms(setting.base(x)))


@pytest.mark.parametrize("rows", ROWS)
def test_padding_behind_a_step_and_a_bias(half, rows):
    setting = Setting(half)
    setting.layer.base_layer.bias = nn.Parameter(torch.randn(2 * INNER).to(half), requires_grad=False)
    ids = ids_of(rows // 2 + 1)
    setting.step(ids)
    x = torch.randn(rows, K).to(half)
    setting.check(setting.mlp(x), x, ids)


def test_adapters_come_and_go(half):
    setting = Setting(half)
    x = torch.randn(7, K).to(half)
    for number in (1, 2, 3):
        setting.step([number] * 7)
        setting.check(setting.mlp(x), x, [number] * 7)
        setting.layer.reset_lora(setting.SLOT_IDS.index(number))
        h = setting.mlp(x)
        gate, up = setting.base(x).double().chunk(2, 1)
        assert torch.allclose(h.double(), setting.f(gate) * up, rtol=EPS[half], atol=1e-3)


def test_hidden_states_of_a_batch_dimension(half):
    setting = Setting(half)
    setting.step(ids_of(10))
    x = torch.randn(2, 5, K).to(half)
    h = setting.mlp(x)
    assert h.shape == (2, 5, INNER)
    setting.check(h, x, ids_of(10))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("room", [16, 64, 128])
@pytest.mark.parametrize("rows", [3, ops.BESIDE_ROWS + 1, ops.FUSED_ROWS, ops.FUSED_ROWS + 1])
def test_which_kernels_run(monkeypatch, rows, room, act):
    """The deltas are no pass of their own over y, but where that is faster."""
    setting = Setting(room=room, tokens=rows + 1, act=act)
    called = vllm_source.note_calls(
        monkeypatch, ("linear_", "linear_delta", "add_delta_", "moe_act", "moe_gate_up_act")
    )
    setting.step(ids_of(rows))
    x = torch.randn(rows, K).to(torch.bfloat16)
    apart = room == 128 or (room == 64 and (rows > ops.FUSED_ROWS or act == "gelu"))
    apart &= rows > ops.BESIDE_ROWS
    setting.check(setting.mlp(x), x, ids_of(rows), apart=apart)
    after = ["linear_"] if apart else ["moe_gate_up_act"]
    assert called == (["linear_delta", "moe_act"] if rows <= ops.BESIDE_ROWS else after)


@pytest.mark.parametrize("room", [16, 64])
def test_batch_invariance(monkeypatch, room):
    """Rows of the base and of adapters, with more rows behind them, with others' adapters there, and with none."""
    monkeypatch.setenv("POLYLORA_BATCH_INVARIANT", "1")
    setting = Setting(room=room)
    x = torch.randn(200, K).to(torch.bfloat16)
    y = setting.base(x)  # the base's own GEMM need not be invariant
    method = setting.layer.base_layer.quant_method
    monkeypatch.setattr(method, "apply", lambda _, x, bias=None: y[: len(x)].clone(), raising=False)

    def rows_of(ids):
        setting.step(ids)
        return setting.mlp(x[: len(ids)])[:7]

    for first in (ids_of(7), [0] * 7):
        results = [rows_of(first + more) for more in ([0], [3], ids_of(ops.BESIDE_ROWS), ids_of(193))]
        results.append(rows_of(first))
        assert all(torch.equal(results[0], other) for other in results[1:]), first


# ------------------------------------------------------------------------------------------------ what is left as it is


class Clamped(Mlp):
    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        return self.act_fn(gate_up * 2)


class Twice(Mlp):
    def forward(self, x):
        return self.act_fn(self.gate_up_proj(x)[0]) + self.act_fn(self.gate_up_proj(x)[0])


class Called(Mlp):
    def forward(self, x):
        y = torch.relu(self.gate_up_proj(x)[0])
        return self.act_fn(y)


class Branches(Mlp):
    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        if x.numel() == 0:
            return gate_up
        return self.act_fn(gate_up)


class Returned(Mlp):
    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        h = self.act_fn(gate_up)
        return h + gate_up.chunk(2, -1)[0]


class Hooked(Mlp):
    def forward(self, x, hook=lambda y: 2 * y):
        y, _ = self.gate_up_proj(x)
        y = hook(y)
        return self.act_fn(y)


@pytest.mark.parametrize("mlp", [Clamped, Twice, Called, Branches, Returned, Hooked])
def test_forward_passes_that_do_more(mlp):
    setting = Setting(mlp=mlp)
    assert not setting.is_fused
    setting.step(ids_of(7))
    x = torch.randn(7, K).to(torch.bfloat16)
    assert setting.layer(x)[0].shape == (7, 2 * INNER)
    setting.mlp(x)


class WithDown(Mlp):
    """``method``: of down."""

    method = vllm_source.PlainGemm

    def __init__(self, gate_up, act):
        super().__init__(gate_up, act)
        self.c_proj = vllm_source.base_linear("RowParallelLinear", INNER, [K], torch.bfloat16)
        self.c_proj.quant_method = self.method()

    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        x = self.act_fn(gate_up)
        return self.c_proj(x)


class WithPlainDown(WithDown):
    method = UnquantizedLinearMethod


def test_a_quantised_down_keeps_vllms_activation():
    """Whatever its name. The stand-in's method is not vLLM's for what is not quantised."""
    assert not Setting(mlp=WithDown).is_fused and Setting(mlp=WithPlainDown).is_fused


def test_no_function_has_no_code():
    assert not activation.feeds_activation(functools.partial(Mlp.forward, None))


@pytest.mark.parametrize(
    "keywords",
    [
        {"act": lambda: SwigluOAIAndMul()},
        {"inner": 76},
        {"dtype": torch.float32},
        {"gather_output": True, "tp_size": 2},
    ],
    ids=["another activation", "odd width", "fp32", "gathered"],
)
def test_layers_that_are_not_served(keywords):
    assert not Setting(**keywords).is_fused


@pytest.mark.parametrize("rows", [7, ops.BESIDE_ROWS + 1])
def test_an_output_of_another_dtype_goes_through_act_fn(rows):
    """The deltas, rounded once to the dtype of the weights, are added to gate and up; act_fn has them before it."""
    setting, ids = Setting(out_dtype=torch.float32), ids_of(rows)
    assert setting.is_fused
    setting.step(ids)
    x = torch.randn(rows, K).to(torch.bfloat16)
    y = setting.layer(x)[0]
    assert not vllm_source.calls and y.shape == (rows, 2 * INNER)
    base = setting.base(x).double()
    delta, slack = torch.zeros_like(base), torch.zeros_like(base)
    for row, number in enumerate(ids):
        for s, (a, b) in enumerate(zip(*setting.weights[number], strict=True)) if number else ():
            if a is not None:
                v, at = a.double() @ x[row].double(), slice(s * INNER, (s + 1) * INNER)
                delta[row, at], slack[row, at] = b.double() @ v, b.double().abs() @ v.abs()
    error = (y.double() - base - delta).abs()
    assert (error <= EPS[torch.bfloat16] * (delta.abs() + slack) + 1e-5).all(), error.max()
    assert torch.equal(y[delta.sum(1) == 0].double(), base[delta.sum(1) == 0])
    h = setting.mlp(x)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, setting.vllms(y), rtol=1e-5, atol=1e-5)


def test_an_unfused_mlp_beside_a_fused_one():
    setting = Setting()
    other = Mlp(nn.Linear(K, INNER), nn.SiLU())
    setting.model.append(other)
    activation.fuse_activations(setting.model, PolyloraPunicaWrapper)  # a second time, too
    assert isinstance(other.act_fn, nn.SiLU) and isinstance(setting.mlp.act_fn.vllms, SiluAndMul)


#: Of vLLM's own MLPs, by module.
VLLMS = {"llama": "LlamaMLP", "qwen2": "Qwen2MLP", "gemma": "GemmaMLP", "deepseek_v2": "DeepseekV2MLP"}


@pytest.mark.parametrize("module", VLLMS)
def test_vllms_mlps_are_known(module):
    mlp = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), VLLMS[module])
    assert activation.feeds_activation(mlp.forward)


# -------------------------------------------------------------------------------------------------------- torch.compile


def test_compiled_without_a_break():
    """Traced once, with vLLM's setting fullgraph=True; later steps and the flag of no LoRA are seen."""
    setting, graphs = Setting(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    setting.step([0] * 6)  # as when vLLM profiles
    forward = torch.compile(setting.mlp, fullgraph=True, backend=backend, dynamic=True)
    x = torch.randn(6, K).to(torch.bfloat16)
    assert torch.equal(forward(x), setting.vllms(setting.base(x)))
    for ids in ([1, 0, 1, 2, 3, 0], [2, 2, 0, 0, 1, 1]):
        setting.step(ids)
        setting.check(forward(x), x, ids)
    assert len(graphs) == 1
    text = graphs[0].print_readable(print_output=False)
    assert "polylora_vllm.before_base" in text and "polylora_vllm.gate_up_act" in text and "silu" not in text


def test_inductor_keeps_the_order():
    setting = Setting()
    setting.step(ids_of(6))
    x = torch.randn(6, K).to(torch.bfloat16)
    setting.check(torch.compile(setting.mlp, fullgraph=True)(x), x, ids_of(6))


@pytest.mark.cuda_only
@pytest.mark.parametrize("rows", [32, 128])
def test_captured_graph_sees_later_steps(half, device, rows):
    setting = Setting(half)
    x = torch.randn(rows, K).to(half)
    setting.step(ids_of(rows))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        setting.mlp(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = setting.mlp(x)
    for ids in ([1, 0, 3] * 5, [], [2] * rows, [0] * (rows - 1) + [3]):
        setting.step(ids)
        graph.replay()
        setting.check(h, x, ids)
