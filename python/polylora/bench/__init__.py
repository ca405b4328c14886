"""``polylora bench``: the ops measured, beside other LoRA kernels where they are installed.

==============  =======================================================================================================
``cases``       which shapes: modules of real models, ranks, rows, adapters; presets
``floor``       what an H100 needs at least, from its measured copy times
``problem``     a case's random data on a device, and the error of a result against float64
``timing``      CUDA graphs of many calls, replayed
``peers``       the other kernels, each made to add into y
``linear``      the run: check, then time
``report``      tables, means by regime, JSON lines, the plot
==============  =======================================================================================================

Method and options: docs/benchmarks.md.
"""
