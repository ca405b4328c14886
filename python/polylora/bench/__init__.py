"""``polylora bench``: the ops measured, beside other LoRA kernels where they are installed.

==============  =======================================================================================================
``cases``       which shapes: modules of real models, ranks, rows, adapters; presets
``floor``       what an H100 needs at least, from its measured copy times
``problem``     a case's random data on a device, and the error of a result against float64
``timing``      CUDA graphs of many calls, replayed
``peers``       the other kernels, each made to add into y
``run``         what runs share: the loop over cases, check before time
``linear``      the run over linear layers and embeddings
``report``      tables, means by regime, JSON lines, the plot
``command``     the command line
``moe``         the run over MoE layers, with ``moe_cases``, ``moe_problem``, ``moe_base`` (the layer without LoRA) and
                ``moe_peers``
==============  =======================================================================================================

Method and options: docs/benchmarks.md.
"""
