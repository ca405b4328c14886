// In place of cutlass_grouped.cu where the build found no CUTLASS headers.
#include "cutlass_grouped.h"
#include "stats.h"

namespace polylora::bench {

std::unique_ptr<CutlassBaseline> make_cutlass_baseline(const Problem&) {
  throw UsageError("--baseline cutlass: built without CUTLASS (docs/benchmarks.md says how to build with it)");
}

}  // namespace polylora::bench
