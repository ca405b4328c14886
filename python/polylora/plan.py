"""The plan: the rows of a step grouped by adapter, on the device, once for all layers.

A plan is one int32 tensor whose size depends on capacities alone (``csrc/include/polylora/plan_layout.h``), so it can
live at one address for the life of a captured CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polylora import _host


def plan_size(rows: int, groups: int, pairs: int = 0) -> int:
    """int32 words of a plan for ``rows`` rows and ``groups`` groups.

    Args:
        rows: rows of the batch; in MoE positions (= pairs without a row map).
        groups: adapter slots; in MoE slots * local experts.
        pairs: MoE with a row map: tokens * top_k; else 0.
    """
    return _host.plan_size(rows, groups, pairs)


@dataclass(frozen=True)
class PlanStats:
    """What a plan's header says (read back from the device: it synchronises)."""

    rows: int
    groups: int
    active_rows: int
    runs: int
    tiles: int
    invalid_ids: int
    max_run: int


class Plan:
    """A plan tensor with its capacities.

    Args:
        rows: rows of the batch; in MoE positions.
        groups: adapter slots; in MoE slots * local experts.
        pairs: MoE with a row map: tokens * top_k; else 0.
        device: where the rows are.
    """

    def __init__(self, rows: int, groups: int, pairs: int = 0, device: torch.device | str = "cpu"):
        self.rows = rows
        self.groups = groups
        self.pairs = pairs
        self.tensor = torch.zeros(plan_size(rows, groups, pairs), dtype=torch.int32, device=device)

    def fill(self, group_ids: torch.Tensor) -> Plan:
        """Groups the rows. ``group_ids``: int32 or int64 ``[rows]``, -1 = no adapter. No synchronisation."""
        torch.ops.polylora.plan(self.tensor, group_ids, self.groups)
        return self

    def fill_moe(
        self,
        topk_ids: torch.Tensor,
        token_slots: torch.Tensor,
        num_slots: int,
        num_experts: int,
        expert_map: torch.Tensor | None = None,
        row_map: torch.Tensor | None = None,
    ) -> Plan:
        """Groups (token, expert) pairs; arguments as :func:`polylora.ops.moe_plan`. No synchronisation."""
        torch.ops.polylora.moe_plan(self.tensor, topk_ids, token_slots, num_slots, num_experts, expert_map, row_map)
        return self

    def stats(self) -> PlanStats:
        """The header, read back from the device."""
        words = self.tensor[: _host.PLAN_HEADER_WORDS].tolist()
        at = _host.PLAN_HEADER
        return PlanStats(
            rows=words[at["rows"]],
            groups=words[at["groups"]],
            active_rows=words[at["active_rows"]],
            runs=words[at["runs"]],
            tiles=words[at["tiles"]],
            invalid_ids=words[at["invalid"]],
            max_run=words[at["max_run"]],
        )
