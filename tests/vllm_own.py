"""vLLM's own LoRA tests, run on polylora's wrapper and ops, at their tolerances: needs an installed vLLM and a GPU.

``python tests/vllm_own.py SOURCE/tests/lora [pytest's arguments]``, SOURCE being vLLM's unpacked source distribution of
the installed version. What of them runs, and on what:

====================  ==================================================================================================
layers, manager       the plugin is registered, so that vLLM hands polylora's wrapper to its layers, and their own check
                      of the wrapper's class asks for that
punica ops            ``lora_shrink`` and ``lora_expand`` are polylora's ``shrink`` and ``expand_``
fused MoE ops         their calls of ``fused_moe_lora`` are ``moe_plan`` and ``moe_gate_up_``
====================  ==================================================================================================

Left out: tests of the arguments of vLLM's own kernels, of several GPUs, and those that download a model. Exit code:
pytest's.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

FILES = ("__init__.py", "conftest.py", "utils.py", "test_layers.py", "test_lora_manager.py", "test_punica_ops.py",
         "test_fused_moe_lora_kernel.py")  # fmt: skip
#: Of the files that call kernels directly, the tests whose calls are replaced.
ON_OURS = {
    "test_punica_ops": {"test_kernels", "test_kernels_hidden_size"},
    "test_fused_moe_lora_kernel": {
        "test_fused_moe_lora_kernel",
        "test_fused_moe_lora_kernel_naive_block_assignment",
        "test_fused_moe_lora_kernel_small_rank",
        "test_fused_moe_lora_kernel_npid_path",
    },
}
DOWNLOADS = {"test_from_lora_tensors", "test_worker_adapter_manager", "test_lru_cache_worker_adapter_manager"}


def main(folder: Path, arguments: list[str]) -> int:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        print(f"vllm_own.py: {folder} is not vLLM's tests/lora: no {', '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as root:
        package = Path(root) / "tests" / "lora"
        package.mkdir(parents=True)
        for name in FILES:
            shutil.copy(folder / name, package)
        # what vLLM's tests of everything else need is not there, and not wanted
        (package.parent / "__init__.py").touch()
        (package.parent / "utils.py").write_text("from vllm_own import ensure_current_vllm_config, multi_gpu_test\n")
        sys.path[:0] = [root, str(Path(__file__).parent)]
        options = ["-p", "vllm_own", "-p", "no:cacheprovider", "--rootdir", root, "-c", "/dev/null"]
        return pytest.main([*options, *arguments, str(package)])


# ------------------------------------------------------------------------------------------------------- as a plugin


@contextmanager
def ensure_current_vllm_config():
    from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config

    if get_current_vllm_config_or_none() is not None:
        yield
        return
    with set_current_vllm_config(VllmConfig()):
        yield


def multi_gpu_test(*, num_gpus: int):
    return pytest.mark.skip(reason=f"needs {num_gpus} GPUs")


@pytest.fixture
def default_vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()) as config:
        yield config


@pytest.fixture
def reset_default_device():
    before = torch.get_default_device()
    yield
    torch.set_default_device(before)


def pytest_configure(config) -> None:
    import polylora_vllm

    polylora_vllm.register()
    if importlib.util.find_spec("ray") is None:  # which the tests shut down at their ends, and never start
        ray = ModuleType("ray")
        ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        ray.shutdown = lambda: None
        sys.modules["ray"] = ray


def pytest_collection_modifyitems(config, items) -> None:
    kept, left = [], []
    for item in items:
        (kept if _prepare(item) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _prepare(item) -> bool:
    """Puts polylora in the place of what the test's module calls; whether the test is one for us."""
    module, name = item.module, item.originalname
    file = module.__name__.rsplit(".", 1)[-1]
    if hasattr(module, "check_punica_wrapper"):
        module.check_punica_wrapper = _is_ours
    if file == "test_punica_ops":
        module.triton_ops = SimpleNamespace(lora_shrink=lora_shrink, lora_expand=lora_expand)
    if file == "test_fused_moe_lora_kernel":
        module.use_fused_moe_lora_kernel = module.use_fused_moe_lora_kernel_naive = moe_gate_up
    return name in ON_OURS.get(file, {name}) - DOWNLOADS


def _is_ours(wrapper: object) -> bool:
    from polylora.vllm_plugin.wrapper import PolyloraPunicaWrapper

    return type(wrapper) is PolyloraPunicaWrapper


# ----------------------------------------------------------------------------------- vLLM's ops by polylora's ops


def _plan_of(rows: Tensor, slots: int) -> Tensor:
    from polylora.plan import plan_size

    plan = torch.empty(plan_size(rows.numel(), slots), dtype=torch.int32)
    torch.ops.polylora.plan(plan, rows.to(torch.int32), slots)
    return plan


def _by_slice(packed: Tensor, slices: int, rank: int) -> Tensor:
    """v ``[M, v_width]``, slices padded to multiples of 8 columns, as ``[slices, M, rank]``."""
    return packed.view(packed.size(0), slices, -1)[..., :rank].transpose(0, 1)


def lora_shrink(x: Tensor, weights: list[Tensor], out: Tensor, rows: Tensor, *rest) -> None:
    """``out[s] = scaling * x A_s^T``. ``weights [slots, R, K]`` each; ``rest`` ends with the scaling."""
    from polylora.table import SliceTable

    slots, rank, _ = weights[0].shape
    a = [w.unsqueeze(1) for w in weights]
    table = SliceTable.from_vllm(a, [w.new_zeros(slots, 1, 8, rank) for w in weights], [rank] * slots)
    packed = torch.zeros(x.size(0), table.v_width, dtype=torch.float32)
    torch.ops.polylora.shrink(packed, x, table.a, table.table, _plan_of(rows, slots))
    out.copy_(_by_slice(packed, len(weights), rank) * rest[-1])


def lora_expand(
    v: Tensor, weights: list[Tensor], out: Tensor, rows: Tensor, *rest, offset_start: int, add_inputs: bool
) -> None:
    """``out[:, offset_start + ...] += v[s] B_s^T``. ``weights [slots, width, R]`` each, ``v [slices, M, R]``."""
    from polylora.table import SliceTable

    assert add_inputs
    slots, _, rank = weights[0].shape
    b = [w.unsqueeze(1) for w in weights]
    table = SliceTable.from_vllm([w.new_zeros(slots, 1, rank, 8) for w in weights], b, [rank] * slots)
    packed = torch.zeros(v.size(1), table.v_width, dtype=torch.float32)
    _by_slice(packed, len(weights), rank).copy_(v)
    cols = [offset_start + col for col in table.cols]
    torch.ops.polylora.expand_(out, packed, table.b, table.table, _plan_of(rows, slots), table.widths, cols)


def moe_gate_up(
    topk_ids: Tensor, topk_weights: Tensor, token_slots: Tensor, rank: int, top_k: int, lora_ids: Tensor,
    a: list[Tensor], b: list[Tensor], x: Tensor, y: Tensor, *rest, fully_sharded: bool = False, **kwargs,
) -> None:  # fmt: skip
    """``y[token, j] += (x[token] A^T) B^T`` of the token's adapter and its j-th expert."""
    from polylora.plan import plan_size
    from polylora.table import SliceTable

    assert not fully_sharded and not kwargs.get("offset")
    table = SliceTable.from_vllm_moe(a, b, [rank] * a[0].size(0))
    plan = torch.empty(plan_size(topk_ids.numel(), table.groups), dtype=torch.int32)
    ops, slots = torch.ops.polylora, token_slots.to(torch.int32)
    ops.moe_plan(plan, topk_ids.to(torch.int32).contiguous(), slots, table.slots, table.experts, None)
    y = y.view(-1, y.size(-1))
    ops.moe_gate_up_(y, x, table.a, table.b, table.table, plan, table.widths, table.cols, table.v_width, top_k)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("usage: vllm_own.py SOURCE/tests/lora [pytest's arguments]", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
