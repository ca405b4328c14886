// In place of cutlass_grouped.cu where the build found no CUTLASS headers.
#include "grouped_gemm.h"
#include "stats.h"

namespace polylora::bench {

bool has_cutlass() { return false; }

std::unique_ptr<GroupedGemm> make_grouped_gemm(const std::vector<GemmProblem>&, const GemmConfig&,
                                               const std::string& what) {
  throw UsageError(what + ": built without CUTLASS (docs/benchmarks.md says how to build with it)");
}

}  // namespace polylora::bench
