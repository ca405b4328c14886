#include "grouped_baseline.h"

namespace polylora::bench {
namespace {

char* element(const void* matrix, int64_t at) {
  return static_cast<char*>(const_cast<void*>(matrix)) + at * kElementBytes;
}

}  // namespace

bool GroupedBaseline::serves(const Problem& problem) {
  const Case& c = problem.shape();
  bool serves = problem.dtype() == DType::kBFloat16 && problem.op() == Op::kLinear && !c.idle &&
                c.k % kGemmVector == 0 && (c.order == RowOrder::kSegments || c.adapters == 1);
  for (const int32_t rank : c.ranks) serves = serves && rank % kGemmVector == 0;
  for (const int32_t width : c.widths) serves = serves && width % kGemmVector == 0;
  for (const SliceEntry& entry : problem.table()) {
    serves = serves && (entry.rank == 0 || entry.scale == problem.table()[0].scale);
  }
  return serves;
}

GroupedBaseline::GroupedBaseline(const Problem& problem)
    : v_(problem.shape().rows * problem.v_width() * kElementBytes, "v of the CUTLASS baseline") {
  for (int64_t call = 0; call < problem.period(); ++call) steps_.push_back(make_step(problem, call));
}

GroupedBaseline::Step GroupedBaseline::make_step(const Problem& problem, int64_t call) const {
  const Case& c = problem.shape();
  const LoraParams p = problem.lora_params(call);
  const std::vector<int32_t>& adapters = problem.row_adapters();
  std::vector<GemmProblem> shrink;
  std::vector<GemmProblem> expand;
  for (int64_t first = 0; first < c.rows;) {
    const int32_t adapter = adapters[static_cast<size_t>(first)];
    int64_t end = first;
    while (end < c.rows && adapters[static_cast<size_t>(end)] == adapter) ++end;
    for (int32_t s = 0; s < p.slices.count; ++s) {
      const SliceEntry& entry = problem.table()[static_cast<size_t>(adapter * p.slices.count + s)];
      char* v = element(v_.as<void>(), first * problem.v_width() + entry.v_col);
      shrink.push_back({end - first, entry.rank, c.k, element(p.x, first * p.x_stride), p.x_stride,
                        element(p.slices.a[s], entry.a_row * p.slices.a_stride[s]), p.slices.a_stride[s], v,
                        problem.v_width()});
      expand.push_back({end - first, p.slices.width[s], entry.rank, v, problem.v_width(),
                        element(p.slices.b[s], entry.b_offset), entry.b_stride,
                        element(p.y, first * p.y_stride + p.slices.col[s]), p.y_stride});
    }
    first = end;
  }
  const float scale = problem.table()[0].scale;
  return {make_grouped_gemm(shrink, {GemmShapes::kLongK, GemmBlocks::kResident, 1, 0}, "CUTLASS shrink"),
          make_grouped_gemm(expand, {GemmShapes::kShortK, GemmBlocks::kResident, scale, 1}, "CUTLASS expand")};
}

void GroupedBaseline::run(int64_t call, cudaStream_t stream) const {
  const Step& step = steps_[static_cast<size_t>(call) % steps_.size()];
  step.shrink->run(stream);
  step.expand->run(stream);
}

}  // namespace polylora::bench
