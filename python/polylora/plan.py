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
        if not isinstance(group_ids, torch.Tensor):
            raise TypeError(f"polylora::Plan.fill: group_ids must be a tensor, got {type(group_ids).__name__}")
        if group_ids.dim() != 1 or group_ids.size(0) != self.rows:
            raise ValueError(f"polylora::Plan.fill: group_ids must be [{self.rows}], got {list(group_ids.shape)}")
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


class PassPlans:
    """Plans that an engine's layers make inside a forward pass: the first that asks makes it, the others read it.

    Each stream has one of its own, as nothing says which of two streams comes first, and so have captured passes: what
    runs eagerly between the pieces of a graph, on other rows, must not change the plan that the later pieces read, nor
    may it read what a replay has left. All passes of a stream share its memory: each fills it before it reads it, and
    they follow each other on the device.

    Args:
        slots: int32 ``[capacity]`` on the device, -1 = no adapter; at one address for good.
        groups: adapter slots.
    """

    def __init__(self, slots: torch.Tensor, groups: int) -> None:
        self._slots, self._groups = slots, groups
        self._memory: dict[tuple[int, bool], torch.Tensor] = {}

    def plan(self, rows: int, made: dict) -> torch.Tensor:
        """The plan of the first ``rows`` rows, int32 ``[plan_size(rows, groups)]``.

        Args:
            made: what this pass has made so far; empty where one begins.
        """
        where = self._where()
        made_rows, plan = made.get((id(self), where), (None, None))
        if made_rows != rows:
            if where not in self._memory:
                with torch.inference_mode(False):  # passes may come in either mode
                    words = plan_size(self._slots.numel(), self._groups)
                    self._memory[where] = torch.empty(words, dtype=torch.int32, device=self._slots.device)
            plan = self._memory[where][: plan_size(rows, self._groups)]
            torch.ops.polylora.plan(plan, self._slots[:rows], self._groups)
            made[id(self), where] = rows, plan
        return plan

    def _where(self) -> tuple[int, bool]:
        """The current stream, and whether it is captured."""
        if not self._slots.is_cuda:
            return 0, False
        stream = torch.cuda.current_stream(self._slots.device).cuda_stream
        return stream, torch.cuda.is_current_stream_capturing()
