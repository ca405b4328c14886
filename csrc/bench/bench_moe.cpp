// What LoRA adds to the forward of an MoE layer: see --help and docs/benchmarks.md.
#include "moe_run.h"

int main(int argc, char** argv) { return polylora::bench::bench_moe_main(argc, argv); }
