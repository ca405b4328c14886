"""The check of a running engine's layers (bench/engine_check.py), on vLLM's own: polylora's kernels, and wrong ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import vllm_source
from torch import nn

vllm_source.require_vllm()
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import engine_check  # noqa: E402
import test_vllm_activation as mlps  # noqa: E402
import test_vllm_moe as moe  # noqa: E402

here = moe.here
TOKENS = 9


class Model(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def linear_of(fused: bool, act: str = "silu") -> tuple[mlps.Setting, Model]:
    setting = mlps.Setting(act=act, mlp=mlps.Mlp if fused else mlps.Twice)
    assert setting.is_fused == fused
    setting.step(mlps.ids_of(TOKENS))
    return setting, Model(gate_up_proj=setting.layer)


@pytest.mark.parametrize("fused, act", [(False, "silu"), *((True, act) for act in mlps.ACTS)])
def test_a_linear_is_as_exact_as_its_dtype(fused, act):
    setting, model = linear_of(fused, act)
    check = engine_check.LayerCheck(model)
    setting.layer(torch.randn(TOKENS + 2, mlps.K).to(torch.bfloat16))
    found = check.stop()
    assert found.keys() == {"gate_up_proj+act" if fused else "gate_up_proj"}
    (of,) = found.values()
    assert of["calls"] == 1 and 1e-4 < of["error"] < 1e-2
    setting.layer(torch.randn(TOKENS, mlps.K).to(torch.bfloat16))
    assert check.stop() == found, "no hook is left"


@pytest.mark.parametrize("fused", [False, True])
def test_a_lost_adapter_is_seen(fused):
    setting, model = linear_of(fused)
    check = engine_check.LayerCheck(model)
    slots = setting.wrapper._tokens.rows  # what the kernels read; the check reads the wrapper's indices
    slots[slots == setting.SLOT_IDS.index(1)] = -1
    setting.layer(torch.randn(TOKENS, mlps.K).to(torch.bfloat16))
    (of,) = check.stop().values()
    assert of["error"] > 0.2


@pytest.mark.parametrize("right", [True, False])
def test_a_layer_that_no_adapter_has_is_held_against_its_output(right):
    setting, model = linear_of(fused=False)
    if right:
        for b in setting.layer.lora_b_stacked:
            b.zero_()
    else:  # what the kernels add, the check does not know of
        setting.layer.lora_b_stacked, kernels = (
            tuple(torch.zeros_like(b) for b in setting.layer.lora_b_stacked),
            setting.layer.lora_b_stacked,
        )
        apply = setting.wrapper.add_lora_linear
        setting.wrapper.add_lora_linear = lambda y, x, a, b, *args, **kwargs: apply(y, x, a, kernels, *args, **kwargs)
    check = engine_check.LayerCheck(model)
    setting.layer(torch.randn(TOKENS, mlps.K).to(torch.bfloat16))
    (of,) = check.stop().values()
    assert of["calls"] == 1 and (of["error"] < 1e-2 if right else of["error"] > 0.1)


def experts_of(kind: str) -> tuple[moe.Layer, Model]:
    layer = moe.Layer(kind, torch.bfloat16)
    layer.adapter(1, [8, 8, 8])
    layer.adapter(7, [16, 4, 16])
    layer.put(0, 1)
    layer.put(2, 7)
    layer.step([1, 0, 7, 7, 1, 0, 1, 7, 7], [1, None, 7, None])
    return layer, Model(experts=layer.layer)


def run(layer: moe.Layer) -> None:
    x = torch.randn(TOKENS, layer.hidden).to(torch.bfloat16)
    ids, weights = layer.route(TOKENS)
    layer.forward(x, ids, weights)


@pytest.mark.parametrize("kind", ["gated", "not_gated", "shared", "3d"])
def test_experts_are_nearly_as_exact_as_their_dtype(kind):
    layer, model = experts_of(kind)
    check = engine_check.LayerCheck(model)
    run(layer)
    found = check.stop()
    assert found.keys() == {"experts"} and found["experts"]["calls"] == 1
    assert 1e-4 < found["experts"]["error"] < 2e-2
    run(layer)
    assert check.stop() == found, "nothing is left of it"


def test_experts_with_another_adapter_are_seen():
    """What the kernels read is not what the check reads."""
    layer, model = experts_of("gated")
    b, exact = layer.layer.w2_lora_b_stacked[0], engine_check.LayerCheck(model)
    run(layer)
    error = exact.stop()["experts"]["error"]
    right = layer.triton.apply

    def wrong(*args, **kwargs):
        b.mul_(2)
        try:
            return right(*args, **kwargs)
        finally:
            b.div_(2)

    layer.triton.apply = wrong
    check = engine_check.LayerCheck(model)
    run(layer)
    assert check.stop()["experts"]["error"] > 10 * error
