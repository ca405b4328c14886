"""The class that vLLM's LoRA layers call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.lora.layers import FusedMoEWithLoRA, LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from polylora.vllm_plugin import experts, ops
from polylora.vllm_plugin.activation import follow_models
from polylora.vllm_plugin.beside import run_beside
from polylora.vllm_plugin.side import follow_batch_invariance
from polylora.vllm_plugin.step import StepRows, slots_of
from polylora.vllm_plugin.tables import FUSED, adopt, follow_layers, go_through, refusal_of_slots, say_once

# While torch.compile traces, what is constant there is said there, once; no part of it is left in the model.
_say_while_tracing = torch.compiler.assume_constant_result(say_once)


class PolyloraPunicaWrapper(PunicaWrapperGPU):
    """vLLM's wrapper with polylora's kernels under linears, the experts of MoE layers, embeddings and logits.

    - ``update_metadata`` puts a step's rows on the device without a synchronisation.
    - A layer takes one fused op, on vLLM's slot tensors in place, at the true ranks of the adapters. Gate and up of a
      gated MLP have its activation in it (:mod:`polylora.vllm_plugin.activation`).
    - So do the two halves of an MoE layer's experts (``add_lora_w13``, ``add_lora_w2``), in the base's intermediate
      buffers, with one plan of the step's (token, expert) pairs, which the first half makes on the device. Unquantised
      Triton experts have them beside their GEMMs, on another stream (:mod:`polylora.vllm_plugin.beside`).
    - vLLM's own kernels, with metadata that is kept up to date, go on serving what polylora does not: an output of
      another dtype than its input, more than 256 ranks or 8 slices, fully sharded LoRA. Shapes and dtypes decide it,
      the same at every call; the log says it once.

    Two passes at a time over one wrapper (micro-batches on two streams) are not supported, nor are they by vLLM's own:
    both would read the rows of the first.

    Args:
        max_num_batched_tokens: rows of the longest step.
        max_batches: sequences of the largest step.
        device: of the layers.
        lora_config: vLLM's ``LoRAConfig``.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs) -> None:
        follow_batch_invariance()
        follow_layers(PolyloraPunicaWrapper, _adopt)
        follow_models(PolyloraPunicaWrapper)
        go_through(PolyloraPunicaWrapper)
        with torch.inference_mode(False):  # steps may come in either mode
            super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
            self._embeddings_indices.zero_()
            self._tokens = StepRows(self.token_mapping_meta, max_num_batched_tokens, self.max_loras, device)
            self._prompts = StepRows(self.prompt_mapping_meta, max_num_batched_tokens, self.max_loras, device)
        self._fully_sharded = bool(self.lora_config.fully_sharded_loras)

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs
    ) -> None:
        """Takes the adapters of the coming steps' tokens and logits. Only queues work on the current stream."""
        self.is_prefill = mapping.is_prefill
        tokens = slots_of(mapping.index_mapping, lora_index_to_id)
        prompts = slots_of(mapping.prompt_mapping, lora_index_to_id)
        self._tokens.update(tokens)
        self._prompts.update(prompts)
        self._update_indices(vocab_size)
        self.indices_len[:] = [tokens.size, prompts.size, prompts.size, tokens.size]

    def _update_indices(self, vocab_size: int) -> None:
        """The 64-bit indices that layers read: slots of tokens and logits, and ``slot * vocab_size``, 0 without."""
        self._token_lora_indices.copy_(self._tokens.rows[: self._token_lora_indices.size(0)])
        self._sampler_indices.copy_(self._prompts.rows[: self._sampler_indices.size(0)])
        embeddings = self._embeddings_indices  # of 0.26: two rows, the second of which is meant
        first_rows = embeddings[1] if embeddings.dim() == 2 else embeddings
        torch.clamp(self._token_lora_indices, min=0, out=first_rows)
        first_rows.mul_(vocab_size)

    # ---------------------------------------------------------------------------------------- what the layers call

    def before_base(self, x: Tensor, lora_a_stacked: tuple[Tensor, ...]) -> None:
        """Before the base's GEMM of ``x``, whose result goes to :meth:`add_lora_linear`."""
        if not torch.compiler.is_compiling() and x.numel() > ops.BESIDE_ROWS * x.shape[-1]:
            return  # the op would find out by itself, and a prompt without a graph waits for the host
        rows_follow_each_other = x.dim() == 2 or x.is_contiguous()  # else the layer copies them for itself
        if x.dtype == lora_a_stacked[0].dtype and rows_follow_each_other:
            step = self._tokens
            x = x.view(-1, x.shape[-1])
            _calls().before_base(step.turn, x, list(lora_a_stacked), step.rows, step.no_lora)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Tensor | None = None,
        **kwargs,
    ) -> None:
        """``y += (x A^T) B^T``, slices side by side.

        Args:
            y: ``[M, sum of widths]``. With ``add_inputs=False``, which vLLM passes where it adds the delta itself, y
                is zeros: adding to it is the same.
            x: ``[M, K]``.
            lora_a_stacked: ``[slots, 1, R, K]`` each; ``lora_b_stacked``: ``[slots, 1, width, R]`` each.
        """
        rank = lora_b_stacked[0].size(-1)
        if y.dtype != x.dtype and len(lora_b_stacked) > 1 and not self._fully_sharded:
            # vLLM's kernel for several slices would read their weights as if they had y's dtype
            delta = torch.zeros_like(y, dtype=x.dtype)
            self.add_lora_linear(delta, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer)
            y.add_(delta)
            return
        if self._fully_sharded or self._declines(y, x, lora_b_stacked, rank, scale):
            assert buffer is None  # vLLM's own refuses one, too
            buffer = torch.empty((len(output_slices), x.size(0), rank), dtype=torch.float32, device=x.device)
            super().add_shrink(buffer, x, lora_a_stacked, scale)
            super().add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=kwargs.get("add_inputs", True))
            return
        _linear(y, x, lora_a_stacked, lora_b_stacked, self._tokens)

    def apply_fused(self, layer: MergedColumnParallelLinearWithLoRA, x: Tensor, bias: Tensor | None) -> Tensor:
        """``act(y + (x A^T) B^T)`` ``[..., width]`` of gate and up, with the base's y ``[..., 2 width]``.

        For layers that :mod:`polylora.vllm_plugin.activation` prepared. Calls that are not served give y with its
        deltas, on which the model's ``act_fn`` goes on working.
        """
        y = layer._get_quant_method().apply(layer.base_layer, x, bias)
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        if y.dtype != x.dtype or self._declines(y, x, b, b[0].size(-1), 1.0):
            return layer._apply_lora_to_output(x, y)
        step, act = self._tokens, getattr(layer, FUSED)
        rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        h = _calls().gate_up_act(*rows, list(a), list(b), step.rows, step.no_lora, step.turn, act)
        return h.view(*y.shape[:-1], h.shape[-1])

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs,
    ) -> None:
        """``y += (x A^T) B^T`` on the rows of the logits. ``y [M, >= vocab]``, ``x [M, hidden]``."""
        if self._declines(y, x, (lora_b_stacked,), lora_b_stacked.size(-1), scale):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
            return
        _linear(y, x, (lora_a_stacked,), (lora_b_stacked,), self._prompts)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs
    ) -> None:
        """``y += x B^T``. ``y [M, dim]``; ``x [M, R]``: the rows of A that vLLM gathered by token."""
        if self._declines(y, x, (lora_b_stacked,), lora_b_stacked.size(-1), 1.0):
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)
            return
        torch.ops.polylora_vllm.expand(y, x.unsqueeze(0), [lora_b_stacked], self._tokens.rows, self._tokens.no_lora, 0)

    def add_shrink(self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs) -> None:
        """``y[s] = x A_s^T``, zeros where a row has no adapter. ``y`` float32 ``[slices, M, R]``, ``x [M, K]``."""
        x = x.view(-1, x.shape[-1])
        rank = lora_a_stacked[0].size(-2)
        if self._fully_sharded or self._declines(x, x, lora_a_stacked, rank, scale):
            super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
            return
        torch.ops.polylora_vllm.shrink(y, x, list(lora_a_stacked), self._tokens.rows, self._tokens.no_lora)

    def add_expand(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs,
    ) -> None:
        """``y[:, offset_start + ...] += x[s] B_s^T``, slices side by side. ``x`` float32 ``[slices, M, R]``."""
        y = y.view(-1, y.shape[-1])
        rank = lora_b_stacked[0].size(-1)
        if self._fully_sharded or not add_inputs or self._declines(y, y, lora_b_stacked, rank, 1.0):
            super().add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **kwargs)
            return
        rows, no_lora = self._tokens.rows, self._tokens.no_lora
        torch.ops.polylora_vllm.expand(y, x, list(lora_b_stacked), rows, no_lora, offset_start)

    # ----------------------------------------------------------------------------------- the experts of MoE layers

    def add_lora_w13(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        num_tokens: int,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: Tensor,
        local_num_experts: int,
        top_k: int,
        num_slices: int,
        fully_sharded: bool,
        use_tuned_config: bool,
        add_inputs: bool = True,
        token_lora_mapping: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``y[pair] += (x[token] A^T) B^T`` of each pair's adapter and expert; rows without one keep their bits.

        Args:
            y: ``[tokens, top_k, N]`` or ``[pairs, N]``, slices side by side in the order of the tuples. With
                ``add_inputs=False`` y is zeros: adding to it is the same.
            x: ``[tokens, K]``.
            lora_a_stacked: ``[slots, experts, R, K]`` each; ``lora_b_stacked``: ``[slots, experts, width, R]`` each.
            topk_ids: ``[tokens, top_k]``; global numbers where there is an ``expert_map`` (int32, -1 = elsewhere).
            token_lora_mapping: int32 ``[tokens]``, the slots of the tokens of all ranks under expert parallelism.
                Without it the step's own rows count.

        Returns four values for :meth:`add_lora_w2` alone: the plan (None: no row has an adapter) and three None. What
        vLLM's own method returns has expert ids in the second place.
        """
        tables = experts.tables_of(lora_a_stacked)
        if tables is None or self._declines(y, x, lora_b_stacked, lora_b_stacked[0].size(-1), 1.0):
            return super().add_lora_w13(
                y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, w1, w2, num_tokens,
                top_k_num, max_loras, adapter_enabled, local_num_experts, top_k, num_slices, fully_sharded,
                use_tuned_config, add_inputs=add_inputs, token_lora_mapping=token_lora_mapping,
            )  # fmt: skip
        slots = self.token_slots(num_tokens, token_lora_mapping)
        if slots is None:
            return None, None, None, None
        plan = experts.empty_plan(tables, topk_ids)
        experts.fill_plan(plan, tables, topk_ids, slots, expert_map)
        y = y.view(-1, y.size(-1))
        experts.add_gate_up(tables, y, x, plan, topk_ids.size(1), tables.cols(lora_a_stacked))
        return plan, None, None, None

    def add_lora_w2(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        topk_weights: Tensor,
        sorted_token_ids_lora: Tensor | None,
        expert_ids_lora: Tensor | None,
        num_tokens_post_padded_lora: Tensor | None,
        token_lora_mapping: Tensor | None,
        num_tokens: int,
        w1: Tensor,
        w2: Tensor,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: Tensor,
        top_k: int,
        fully_sharded: bool,
        tp_rank: int,
        use_tuned_config: bool,
        add_inputs: bool = True,
    ) -> None:
        """``y[pair] += w[pair] (x[pair] A^T) B^T`` of each pair's adapter and expert.

        Args:
            y: ``[tokens, top_k, hidden]``. With ``add_inputs=False`` y is zeros: adding to it is the same.
            x: ``[pairs, I]``.
            topk_weights: ``[tokens, top_k]``.
            sorted_token_ids_lora, expert_ids_lora, num_tokens_post_padded_lora, token_lora_mapping: what
                :meth:`add_lora_w13` returned for these tokens; whose kernels served them serve these.
        """
        if expert_ids_lora is not None:
            super().add_lora_w2(
                y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora, expert_ids_lora,
                num_tokens_post_padded_lora, token_lora_mapping, num_tokens, w1, w2, top_k_num, max_loras,
                adapter_enabled, top_k, fully_sharded, tp_rank, use_tuned_config, add_inputs=add_inputs,
            )  # fmt: skip
            return
        plan = sorted_token_ids_lora
        if plan is not None:
            tables = experts.tables_of(lora_a_stacked)
            experts.add_down(tables, y.view(-1, y.size(-1)), x, plan, topk_weights)

    def token_slots(self, num_tokens: int, mapping: Tensor | None) -> Tensor | None:
        """The slots of an MoE layer's tokens, int32 ``[num_tokens]``; None: no token has an adapter.

        Where tokens of all ranks are gathered (``mapping``), this rank's own flag says nothing about the others'.
        """
        if mapping is not None:
            return mapping[:num_tokens]
        return None if self._tokens.no_lora.item() else self._tokens.rows[:num_tokens]

    # ------------------------------------------------------------------------------------- what vLLM's kernels serve

    def _declines(self, y: Tensor, x: Tensor, weights: tuple[Tensor, ...], rank: int, scale: float) -> bool:
        """Whether a call is left to vLLM's kernels: constants decide it, while torch.compile traces it.

        Args:
            weights: slot tensors, one a slice; ``rank``: what they have room for.
        """
        reason = refusal_of_slots(rank, len(weights), weights[0].dtype)
        if reason is None and y.dtype != x.dtype:
            reason = f"an output of {y.dtype} for an input of {x.dtype}"
        if reason is None and x.dtype != weights[0].dtype:
            reason = f"an input of {x.dtype} for LoRA weights of {weights[0].dtype}"
        if reason is None and scale != 1.0:
            reason = f"a scale of {scale} beside the weights"
        return reason is not None and _say_while_tracing(f"layers with {reason} keep vLLM's kernels.")


def _adopt(layer: nn.Module) -> None:
    """What is done to each layer that is given the wrapper."""
    if isinstance(layer, FusedMoEWithLoRA):
        tables = experts.adopt_experts(layer)
        if tables is not None:
            run_beside(layer, tables)
    else:
        adopt(layer)


def _calls():
    """Where the ops of a layer are called.

    A prompt without a graph waits for the host, so its layers call the functions themselves: on a CPU a linear takes 25
    us so, of which polylora's op has 13, and 33 through the dispatcher. Other tracers than Dynamo, which vLLM does not
    use, would look into the functions.
    """
    return torch.ops.polylora_vllm if torch.compiler.is_compiling() else ops


def _linear(y: Tensor, x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], step: StepRows) -> None:
    """``y += (x A^T) B^T`` on the rows of a step."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    _calls().linear(y, x, list(a), list(b), step.rows, step.no_lora, step.turn)
