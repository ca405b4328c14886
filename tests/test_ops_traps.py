"""That every known failure of other LoRA kernels has a test, and that the cases themselves are worth running."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from cases import make_dense_case, make_ids, make_moe_case, make_moe_half, ops

KERNEL_TRAPS = {*range(1, 16), 27, 28, 29}


def marked_traps() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for file in Path(__file__).parent.glob("test_ops_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap":
                    for number in mark.args:
                        found.setdefault(number.value, []).append(node.name)
    return found


def test_every_trap_has_a_test():
    missing = KERNEL_TRAPS - set(marked_traps())
    assert not missing, f"no test is marked for traps {sorted(missing)}"


@pytest.mark.trap(28)
def test_cases_are_not_degenerate(device, dtype):
    """Two adapters give the same row different outputs; rows and columns of an output differ from each other."""
    case = make_dense_case(device, dtype, ids=[0, 1] * 20, groups=3, absent=0.0, ranks=(8, 16), widths=(80,))
    first = case.y.view.cpu()[:, case.cols[0] : case.cols[0] + 80].double()
    ops.linear_(**case.linear_args())
    delta = case.y.view.cpu()[:, case.cols[0] : case.cols[0] + 80].double() - first
    assert torch.linalg.matrix_rank(delta[0::2], rtol=0.02) >= 7  # rank 8 or 16, not one direction over and over
    left, right = (torch.linalg.qr(delta[i::2].T)[0][:, :8] for i in (0, 1))
    assert torch.linalg.matrix_norm(left.T @ right, ord=2) < 0.98, "two adapters span one subspace"
    assert delta.std(0).min() > 0.05 and delta.std(1).min() > 0.05


def test_patterns_of_ids_are_what_their_names_say():
    ids = make_ids("two_segments", 150, 6)
    assert ids[0] == ids[-1] == 0 and 0 not in ids[50:100]
    assert set(make_ids("base_and_one", 60, 5)) == {-1, 4}
    assert any(not -1 <= g < 5 for g in make_ids("invalid", 60, 5))
    assert -1 in make_ids("mixed", 60, 5) and len(set(make_ids("mixed", 60, 5))) == 6
    assert sorted(make_ids("skewed", 30, 5)) == [0] * 26 + [1, 2, 3, 4]


def test_moe_cases_hold_duplicates_missing_experts_and_base_tokens():
    case = make_moe_case("cpu", tokens=60, experts=4)
    topk = case.topk_ids.tolist()
    assert any(len(set(row)) < len(row) for row in topk) and any(-1 in row for row in topk)
    assert -1 in case.token_slots.tolist() and {-1, -2} < set(case.rows.row_group)
    half = make_moe_half(case, down=False)
    assert half.parts and half.base_parts
