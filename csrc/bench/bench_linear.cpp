// linear, its halves shrink and expand, and the plan: see --help and docs/benchmarks.md.
#include "run.h"

int main(int argc, char** argv) { return polylora::bench::bench_main(argc, argv, false); }
