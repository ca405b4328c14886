"""polylora's kernels behind SGLang's LoRA layers. How to turn it on: ``polylora_sglang.py``, beside this package.

===============  ====================================================================================================
``backend.py``   :class:`~polylora.sglang_plugin.backend.PolyloraLoRABackend`: the methods that SGLang's layers call
``batch.py``     which adapter each row of a batch uses, at one address for CUDA graphs, and the plan made of it
``tables.py``    SGLang's memory pool, used in place; layers of one shape share a table of the slots' ranks and scales
``moe.py``       the experts: the deltas that SGLang's MoE runners ask for between their GEMMs
===============  ====================================================================================================

Served: dense linears (one fused op a layer), embeddings, lm_head; experts on the runners ``triton`` and ``marlin``.
SGLang's own kernels go on serving ``kv_b_proj`` where MLA absorbs it into attention, and the experts on its
experimental runners; the latter is said in the log, once. DP attention, two-batch overlap and PD multiplexing are
refused when the server starts.

Importing this package does not import SGLang; its modules but this one do.
"""
