"""The class that SGLang's LoRA layers call."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.dense.plan import DenseLoraKind
from sglang.srt.lora.layers import (
    BaseLayerWithLoRA,
    FusedMoEWithLoRA,
    ParallelLMHeadWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from sglang.srt.lora.lora_moe_runners import LoRAInfo
from sglang.srt.lora.utils import get_batch_token_counts, get_lm_head_pruned_lens
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant
from torch import Tensor, nn

import polylora
from polylora.sglang_plugin.batch import Batch, BatchBuffer, HeadRows, Rows, head_rows
from polylora.sglang_plugin.moe import serve_experts
from polylora.sglang_plugin.tables import PoolTables, Weights

logger = logging.getLogger("sglang.polylora")

_ops = torch.ops.polylora


class PolyloraLoRABackend(BaseLoRABackend):
    """SGLang's LoRA backend with polylora's kernels.

    - :meth:`prepare_lora_batch` puts a batch's rows on the device in one copy, without a synchronisation.
    - A layer takes one fused op (:meth:`forward_with_base`), on the memory pool in place, at the true ranks. A
      row-parallel layer adds its part of the delta before its one all-reduce.
    - ``run_*``: the same by halves, for callers of SGLang's older interface.
    - Experts: :mod:`polylora.sglang_plugin.moe`. Where SGLang's experimental runners serve them, they keep its kernels.

    Args:
        max_loras_per_batch: adapter slots of the memory pool, that of the base model among them.
        device: of the layers.
        server_args: SGLang's; of it only the modes are looked at that the backend refuses.

    Raises RuntimeError where the library has no kernels for the device, ValueError for a mode that keeps two batches
    in flight over one description, or replaces the layers' calls.
    """

    name = "polylora"
    supports_prefill_cuda_graph = True
    # Batches without adapters replay graphs of their own, and launch nothing of LoRA.
    skip_inactive_dense_lora = True

    def __init__(self, max_loras_per_batch: int, device: torch.device, server_args: Any) -> None:
        super().__init__(max_loras_per_batch, device)
        if torch.device(device).type == "cuda" and not polylora.has_cuda_kernels():
            raise RuntimeError("polylora: its library was built without CUDA kernels; choose another --lora-backend")
        _refuse_modes(server_args)
        if getattr(server_args, "enable_deterministic_inference", False):
            os.environ.setdefault("POLYLORA_BATCH_INVARIANT", "1")  # which the kernels' launchers read
        self.tables = PoolTables(max_loras_per_batch)
        self._decode: BatchBuffer | None = None
        self._prefill: BatchBuffer | None = None
        self._model: weakref.ref[nn.Module] | None = None  # until the tables of its layers are made
        self._has_head = False
        self._serves_experts = False

    def validate_lora_targets(self, base_model: nn.Module, target_modules: set[str]) -> None:
        """SGLang calls it once, before it wraps the layers and makes the pool."""
        self._model = weakref.ref(base_model)
        self._has_head = "lm_head" in target_modules

    # ------------------------------------------------------------------------------------------------------- the batch

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        """Memory for the batches of decode's graphs, and of the target verification of speculative decoding."""
        self._decode = self._buffer(max_bs_in_cuda_graph, max_bs_in_cuda_graph * num_tokens_per_req, graph=True)

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens: int, max_num_requests: int | None = None) -> None:
        """Memory for the batches of prefill's graphs."""
        requests = max_num_tokens if max_num_requests is None else max_num_requests
        self._prefill = self._buffer(requests, max_num_tokens, graph=True)
        self.prefill_cuda_graph_batch_info = self._prefill.info
        self.prefill_cuda_graph_max_bs = requests
        self.prefill_cuda_graph_max_tokens = max_num_tokens

    def _buffer(self, requests: int, tokens: int, *, graph: bool = False) -> BatchBuffer:
        return BatchBuffer(self.max_loras_per_batch, requests, tokens, self.device, graph=graph)

    def prepare_lora_batch(
        self,
        forward_batch: ForwardBatch,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_decode_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Takes the adapters of the coming pass. Only queues work on the current stream.

        Args:
            weight_indices: pool slot of each request.
            lora_ranks, scalings: by slot; 0 where no request of the batch uses it.
            use_decode_cuda_graph, use_prefill_cuda_graph: whether a graph may read the batch, from memory that
                ``init_*_cuda_graph_batch_info`` made. Raises RuntimeError where that was not called.
        """
        lengths = _rows_of_requests(forward_batch)
        if use_decode_cuda_graph:
            buffer = _made(self._decode, "decode")
        elif use_prefill_cuda_graph:
            buffer = _made(self._prefill, "prefill")
        else:
            buffer = self._buffer(len(lengths), sum(lengths))
        # A request without an adapter may be given the slot of another one's, where the base model has none.
        slots = [
            slot if uid is not None and lora_ranks[slot] > 0 else -1
            for slot, uid in zip(weight_indices, forward_batch.lora_ids, strict=True)
        ]
        self._take(buffer, weight_indices, slots, lengths, lora_ranks, scalings)
        self._take_head(forward_batch, weight_indices, slots)

    def prepare_lora_token_segments(
        self, *, segment_lens: list[int], weight_indices: list[int], lora_ranks: list[int], scalings: list[float]
    ) -> None:
        """Takes segments of rows in place of requests, for a pass without a graph. Arguments as above."""
        self.reset_batch_state()
        slots = [slot if lora_ranks[slot] > 0 else -1 for slot in weight_indices]
        buffer = self._buffer(len(segment_lens), sum(segment_lens))
        self._take(buffer, weight_indices, slots, segment_lens, lora_ranks, scalings)

    def _take(
        self,
        buffer: BatchBuffer,
        weight_indices: Sequence[int],
        slots: Sequence[int],
        lengths: Sequence[int],
        ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> None:
        self._make_tables()
        self.tables.set_slots(ranks, scalings)
        self.batch_info = buffer.fill(weight_indices, slots, lengths, ranks, scalings)
        if self.is_moe_lora:
            self.batch_info.moe_lora_info = buffer.moe_info(
                buffer.requests if buffer is self._prefill else len(lengths)
            )
        if not self.batch_info.use_cuda_graph and any(slot >= 0 for slot in slots):
            self._make_plan()

    def _take_head(self, forward_batch: ForwardBatch, weight_indices: list[int], slots: Sequence[int]) -> None:
        """A prefill computes the logits of some rows alone; of many in parts, each of which is a pass of its own."""
        self.lm_head_batch_info = self.lm_head_pass_batch_infos = self._lm_head_pass_idx = None
        lengths = get_lm_head_pruned_lens(forward_batch) if self._has_head else None
        if lengths is None:
            return
        rows = head_rows(slots, lengths, self.max_loras_per_batch, self.device)
        self.lm_head_batch_info = HeadRows(rows, rows.count)
        parts = self._get_lm_head_pass_segments(weight_indices, lengths)
        if parts is not None:
            sizes = [sum(part_lengths) for _, part_lengths in parts]
            self.lm_head_pass_batch_infos = [HeadRows(part, part.count) for part in rows.split(sizes)]

    def reset_routing_cache(self) -> None:
        """The plan of the batch is made anew: SGLang calls it as the first thing of each pass that is to be captured.

        It is made here, so that layers on the pass's own stream find it; those on a side stream make their own.
        """
        super().reset_routing_cache()
        if self.batch_info is not None and get_capture_lora_variant() != "nolora":
            self._make_plan()

    def _make_plan(self) -> None:
        rows = self.batch_info.rows
        rows.forget()
        rows.plan(rows.count)

    def _make_tables(self) -> None:
        """The tables of all layers, before the first pass: while a graph is captured, none can be made."""
        model = self._model() if self._model is not None else None
        self._model = None
        for layer in model.modules() if model is not None else ():
            if isinstance(layer, BaseLayerWithLoRA) and layer.set_lora:
                self._make_table(layer)

    def _make_table(self, layer: BaseLayerWithLoRA) -> None:
        if isinstance(layer, VocabParallelEmbeddingWithLoRA):
            self.tables.embedding(layer.embedding_A_buffer, layer.embedding_B_buffer)
        elif isinstance(layer, ParallelLMHeadWithLoRA):
            self._linear_weights(layer.lm_head_A_buffer, layer.lm_head_B_buffer, layer.lora_offsets)
        elif not isinstance(layer, FusedMoEWithLoRA):
            self._linear_weights(layer.lora_a, layer.lora_b, layer.lora_offsets)
        elif self._serves_experts:
            up_a, up_b = layer.gate_up_lora_a_weights, layer.gate_up_lora_b_weights
            self.tables.experts(up_a, up_b, up_a.size(2) // up_b.size(3))
            self.tables.experts(layer.down_lora_a_weights, layer.down_lora_b_weights, 1)

    # ------------------------------------------------------------------------------------------- what the layers call

    def forward_with_base(
        self,
        layer: nn.Module,
        x: Tensor,
        base_fn: Callable[[], Tensor],
        lora_a: Tensor,
        lora_b: Tensor,
        output_offset: Tensor,
        offsets: Sequence[int],
        *,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        kind: DenseLoraKind = DenseLoraKind.LINEAR,
        pruned_batch_info: HeadRows | None = None,
    ) -> Tensor:
        """``base_fn() + scale * (x A^T) B^T``, into what ``base_fn`` returns; then the all-reduce, if any.

        A is cut like the base's weight where the layer is row-parallel, and B whole: the parts of the delta add up to
        it like those of the base's output, in one all-reduce.

        Args:
            x: ``[M, K]``; of an embedding token ids ``[M]``, of which those outside A's vocabulary add nothing.
            lora_a: ``[slots, slices * r_max, K]`` (embedding ``[slots, r_max, vocab]``); ``lora_b``:
                ``[slots, N, r_max]``.
            offsets: where the slices begin in the output, and where the last one ends; it may be wider.
            pruned_batch_info: of lm_head in a prefill, the rows that it is given.
        """
        y = base_fn()
        rows = self._rows(pruned_batch_info)
        if kind is DenseLoraKind.EMBEDDING:
            self._add_embedding(y, x, self.tables.embedding(lora_a, lora_b), rows)
        else:
            self._add(y, x, self._linear_weights(lora_a, lora_b, offsets), rows)
        return y if all_reduce is None else all_reduce(y)

    def run_qkv_lora(
        self,
        x: Tensor,
        qkv_lora_a: Tensor,
        qkv_lora_b: Tensor,
        output_offset: Tensor,
        max_qkv_out_dim: int,
        base_output: Tensor | None = None,
        n_slices: int = 3,
        *,
        output_offset_cpu: Tensor,
    ) -> Tensor:
        """``base_output`` (or zeros) plus the delta of slices of any widths, in place.

        Args:
            x: ``[M, K]``. ``qkv_lora_a``: ``[slots, n_slices * r_max, K]``; ``qkv_lora_b``: ``[slots, N, r_max]``.
            output_offset_cpu: ``[n_slices + 1]``, on the host: where the slices begin, and where the last one ends.
        """
        weights = self._linear_weights(qkv_lora_a, qkv_lora_b, output_offset_cpu.tolist())
        return self._add(_output(base_output, x, qkv_lora_b), x, weights, self._rows())

    def run_gate_up_lora(
        self,
        x: Tensor,
        gate_up_lora_a: Tensor,
        gate_up_lora_b: Tensor,
        output_offset: Tensor | None = None,
        base_output: Tensor | None = None,
        output_offset_cpu: Tensor | None = None,
    ) -> Tensor:
        """The same for two slices of one width."""
        width = gate_up_lora_b.size(1) // 2
        weights = self._linear_weights(gate_up_lora_a, gate_up_lora_b, (0, width, 2 * width))
        return self._add(_output(base_output, x, gate_up_lora_b), x, weights, self._rows())

    def run_lora_a_sgemm(
        self, x: Tensor, weights: Tensor, pruned_batch_info: HeadRows | None = None, stack_num: int = 1
    ) -> Tensor:
        """``x A^T``, unscaled: float32 ``[M, stack_num * r_max]``, slice s at column ``s * r_max``, zeros elsewhere."""
        a = self.tables.half_a(weights, stack_num)
        v = x.new_zeros(x.size(0), a.table.v_width, dtype=torch.float32)
        _ops.shrink(v, x, a.a, a.table.table, self._rows(pruned_batch_info).plan(x.size(0)))
        r_max = weights.size(1) // stack_num
        return v.view(x.size(0), stack_num, -1)[..., :r_max].flatten(1)

    def run_lora_b_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        output_offset: Tensor | None = None,
        base_output: Tensor | None = None,
        pruned_batch_info: HeadRows | None = None,
        *,
        output_offset_cpu: Tensor | None = None,
    ) -> Tensor:
        """``base_output`` (or zeros) plus ``scale * x B^T``, in place. ``x``: what :meth:`run_lora_a_sgemm` or
        :meth:`run_lora_a_embedding` returned; ``output_offset_cpu``: as in :meth:`run_qkv_lora`; None: one slice."""
        offsets = (0, weights.size(1)) if output_offset_cpu is None else output_offset_cpu.tolist()
        t = (b := self.tables.half_b(weights, _widths(offsets))).table
        v = torch.zeros(x.size(0), t.v_width, dtype=torch.float32, device=x.device)
        slices = len(t.widths)
        v.view(x.size(0), slices, -1)[..., : weights.size(2)].copy_(x.view(x.size(0), slices, -1))
        y = _output(base_output, x, weights)
        _ops.expand_(y, v, b.b, t.table, self._rows(pruned_batch_info).plan(x.size(0)), t.widths, t.cols)
        return y

    def run_lora_a_embedding(
        self, input_ids: Tensor, weights: Tensor, vocab_size: int, extra_embeddings: Tensor | None = None
    ) -> Tensor:
        """``A[:, token]`` of each row's adapter, zeros where there is none: ``[M, r_max]``.

        Args:
            input_ids: ``[M]``; outside A's vocabulary: zeros.
            weights: ``[slots, r_max, vocab]``.
            extra_embeddings: must be None, as SGLang has no layers yet that serve adapters with tokens of their own.
        """
        if extra_embeddings is not None:
            raise NotImplementedError("polylora: run_lora_a_embedding serves no adapters with tokens of their own")
        slots = self._rows().first(input_ids.numel())
        known = (slots >= 0) & (input_ids >= 0) & (input_ids < weights.size(2))
        at = slots.clamp(min=0).long()
        picked = weights[at, :, input_ids.clamp(0, weights.size(2) - 1)]
        below_rank = torch.arange(weights.size(1), device=slots.device) < self.batch_info.lora_ranks[at][:, None]
        return torch.where(known[:, None] & below_rank, picked, 0)

    def run_extra_token_embedding(
        self, input_ids: Tensor, output: Tensor, extra_embeddings: Tensor, vocab_size: int
    ) -> Tensor:
        """Replaces the rows of tokens that adapters added to the vocabulary. Returns ``output``, changed in place.

        Args:
            input_ids: ``[M]``. ``output``: ``[M, dim]``.
            extra_embeddings: ``[slots, extra tokens, dim]``; token ``vocab_size + i`` is row i of its row's adapter.
        """
        slots = self._rows().first(input_ids.numel())
        extra = input_ids - vocab_size
        known = (slots >= 0) & (extra >= 0) & (extra < extra_embeddings.size(1))
        rows = extra_embeddings[slots.clamp(min=0).long(), extra.clamp(0, extra_embeddings.size(1) - 1)]
        return output.copy_(torch.where(known[:, None], rows, output))

    def _rows(self, pruned_batch_info: HeadRows | None = None) -> Rows:
        if pruned_batch_info is not None:
            return pruned_batch_info.rows
        if not isinstance(self.batch_info, Batch):
            raise RuntimeError("polylora: a LoRA layer was called before prepare_lora_batch")
        return self.batch_info.rows

    def _linear_weights(self, a: Tensor, b: Tensor, offsets: Sequence[int]) -> Weights:
        return self.tables.linear(a, b, _widths(offsets))

    @staticmethod
    def _add(y: Tensor, x: Tensor, weights: Weights, rows: Rows) -> Tensor:
        t = weights.table
        _ops.linear_(y, x, weights.a, weights.b, t.table, rows.plan(x.size(0)), t.widths, t.cols, t.v_width)
        return y

    @staticmethod
    def _add_embedding(y: Tensor, token_ids: Tensor, weights: Weights, rows: Rows) -> None:
        t, plan = weights.table, rows.plan(token_ids.size(0))
        _ops.embedding_(y, token_ids, weights.a, weights.b, t.table, plan, t.widths, t.cols, t.vocab)

    # ------------------------------------------------------------------------------------------------------ the experts

    @property
    def is_moe_lora(self) -> bool:
        return self._is_moe_lora

    @is_moe_lora.setter
    def is_moe_lora(self, value: bool) -> None:
        """SGLang sets it when it wraps the first MoE layer: by then the runner of the experts is known."""
        if value and not self._is_moe_lora:
            runner = get_moe_runner_backend()
            if runner.is_experimental_sgl_trtllm() or runner.is_experimental_sgl_marlin():
                logger.warning("polylora: experts on the %s runner keep SGLang's kernels.", runner.value)
            else:
                self._serves_experts = True
                serve_experts(self)
        self._is_moe_lora = value

    def init_cuda_graph_moe_buffers(self, max_bs, max_loras, compute_dtype, moe_layer, *, prefill=False) -> None:
        """Scratch of SGLang's kernels for the experts; polylora's need none that lasts."""
        if not self._serves_experts:
            super().init_cuda_graph_moe_buffers(max_bs, max_loras, compute_dtype, moe_layer, prefill=prefill)

    def owns(self, lora_info: LoRAInfo | None) -> bool:
        """Whether an MoE layer's call is part of this backend's batch, and served here."""
        batch = self.batch_info
        if lora_info is None or not self._serves_experts or batch is None or batch.moe_lora_info is None:
            return False
        return lora_info.token_lora_mapping is batch.moe_lora_info.token_lora_mapping


def _refuse_modes(server_args: Any) -> None:
    modes = {
        "--enable-pdmux": getattr(server_args, "enable_pdmux", False),
        "--enable-two-batch-overlap": getattr(server_args, "enable_two_batch_overlap", False),
        "SGLANG_EXPERIMENTAL_LORA_OPTI": envs.SGLANG_EXPERIMENTAL_LORA_OPTI.get(),
    }
    for mode, on in modes.items():
        if on:
            raise ValueError(f"polylora: --lora-backend polylora does not support {mode}")


def _made(buffer: BatchBuffer | None, phase: str) -> BatchBuffer:
    if buffer is None:
        raise RuntimeError(f"polylora: init_{phase}_cuda_graph_batch_info must come before a batch of {phase} graphs")
    return buffer


def _rows_of_requests(forward_batch: ForwardBatch) -> list[int]:
    """How many rows each request has, known on the host. Raises ValueError for a mode that SGLang's LoRA lacks."""
    if forward_batch.forward_mode.is_extend_without_speculative():
        return list(forward_batch.extend_seq_lens_cpu)
    _, rows = get_batch_token_counts(forward_batch)
    return [rows] * forward_batch.batch_size


def _widths(offsets: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]


def _output(base_output: Tensor | None, x: Tensor, b: Tensor) -> Tensor:
    return torch.zeros(x.size(0), b.size(1), dtype=b.dtype, device=x.device) if base_output is None else base_output
