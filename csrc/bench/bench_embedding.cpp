// The embedding op: see --help and docs/benchmarks.md.
#include "run.h"

int main(int argc, char** argv) { return polylora::bench::bench_main(argc, argv, true); }
