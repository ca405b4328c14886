"""polylora's kernels behind vLLM's LoRA layers. How to turn it on: ``polylora_vllm.py``, beside this package.

=================  ==================================================================================================
``wrapper.py``     :class:`~polylora.vllm_plugin.wrapper.PolyloraPunicaWrapper`: the methods that vLLM's layers call
``ops.py``         ``torch.ops.polylora_vllm.*``: those methods, opaque to ``torch.compile``
``step.py``        which adapter each row of a step uses, and the plan made of it inside the forward pass
``tables.py``      vLLM's slot tensors, used in place, with the true rank of the adapter in each slot
``activation.py``  the activation of a gated MLP, in one pass over gate and up with their deltas
``experts.py``     those of MoE layers, and what the two halves of their experts do with them
``beside.py``      the same on another stream, beside the GEMMs of vLLM's unquantised Triton experts
``side.py``        that stream, which steps of few rows use for linears, too
=================  ==================================================================================================

vLLM's own kernels go on serving what these do not: fully sharded LoRA, slots of more ranks than polylora has, outputs
of another dtype than their inputs. What it is and why is in the log, once.

Importing this package does not import vLLM; its modules but this one do.
"""
