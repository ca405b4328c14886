// The 2.x grouped kernels: mma.sync with cp.async, tiles handed out by the device as the kernel runs. They are what a
// user of CUTLASS has for problems of a few rows; the sm_90 kernels start at tiles of 64 rows with TMA descriptors made
// on the device for every problem.
#include "cutlass_grouped.h"

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include <vector>

#include "stats.h"

namespace polylora::bench {
namespace {

using cutlass::gemm::GemmCoord;
using cutlass::gemm::GemmShape;
using Element = cutlass::bfloat16_t;

constexpr int kVector = 8;  // elements of a 16-byte access

template <typename Threadblock, typename Warp, int kStages>
using Grouped = cutlass::gemm::device::GemmGrouped<typename cutlass::gemm::kernel::DefaultGemmGrouped<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kVector,     // x or v
    Element, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kVector,  // A or B, [n, k] in memory
    Element, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Threadblock, Warp,
    GemmShape<16, 8, 16>, cutlass::epilogue::thread::LinearCombination<Element, kVector, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, kStages,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel>;

// Shrink has few tiles with a long K, expand many with a short one.
using Shrink = Grouped<GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, 4>;
using Expand = Grouped<GemmShape<64, 128, 32>, GemmShape<32, 64, 32>, 4>;

// One grouped GEMM over the problems of a set: D = alpha A B + beta C.
struct Operands {
  std::vector<GemmCoord> size;
  std::vector<const void*> a, b;
  std::vector<void*> c;
  std::vector<int64_t> lda, ldb, ldc;

  void add(const GemmCoord& problem, const void* a_at, int64_t a_pitch, const void* b_at, int64_t b_pitch, void* c_at,
           int64_t c_pitch) {
    size.push_back(problem);
    a.push_back(a_at);
    b.push_back(b_at);
    c.push_back(c_at);
    lda.push_back(a_pitch);
    ldb.push_back(b_pitch);
    ldc.push_back(c_pitch);
  }
};

template <typename Gemm>
class Launch {
 public:
  Launch(const Operands& host, float alpha, float beta, const char* what)
      : size_(upload(host.size, what)),
        a_(upload(host.a, what)),
        b_(upload(host.b, what)),
        c_(upload(host.c, what)),
        lda_(upload(host.lda, what)),
        ldb_(upload(host.ldb, what)),
        ldc_(upload(host.ldc, what)) {
    const int count = static_cast<int>(host.size.size());
    const int blocks = Gemm::sufficient(host.size.data(), count);
    if (blocks <= 0) throw CudaError(cudaErrorInvalidConfiguration, what);
    const typename Gemm::Arguments arguments(
        size_.as<GemmCoord>(), count, blocks, {alpha, beta}, a_.as<Element*>(), b_.as<Element*>(), c_.as<Element*>(),
        c_.as<Element*>(), lda_.as<int64_t>(), ldb_.as<int64_t>(), ldc_.as<int64_t>(), ldc_.as<int64_t>());
    if (gemm_.initialize(arguments) != cutlass::Status::kSuccess) throw CudaError(cudaErrorInvalidValue, what);
  }

  cudaError_t run(cudaStream_t stream) {
    return gemm_.run(stream) == cutlass::Status::kSuccess ? cudaSuccess : cudaErrorLaunchFailure;
  }

 private:
  DeviceBuffer size_, a_, b_, c_, lda_, ldb_, ldc_;
  Gemm gemm_;
};

// A set of weights with a copy of x and y.
struct Step {
  Launch<Shrink> shrink;
  Launch<Expand> expand;
};

class GroupedBaseline : public CutlassBaseline {
 public:
  explicit GroupedBaseline(const Problem& problem)
      : v_(problem.shape().rows * problem.v_width() * kElementBytes, "v of the CUTLASS baseline") {
    for (int64_t call = 0; call < problem.period(); ++call) add_step(problem, call);
  }

  cudaError_t run(int64_t call, cudaStream_t stream) override {
    Step& step = *steps_[static_cast<size_t>(call) % steps_.size()];
    const cudaError_t error = step.shrink.run(stream);
    return error == cudaSuccess ? step.expand.run(stream) : error;
  }

 private:
  void add_step(const Problem& problem, int64_t call) {
    const Case& c = problem.shape();
    const LoraParams p = problem.lora_params(call);
    const std::vector<int32_t>& adapters = problem.row_adapters();
    Operands shrink;
    Operands expand;
    for (int64_t first = 0; first < c.rows;) {
      const int32_t adapter = adapters[static_cast<size_t>(first)];
      int64_t end = first;
      while (end < c.rows && adapters[static_cast<size_t>(end)] == adapter) ++end;
      for (int32_t s = 0; s < p.slices.count; ++s) {
        const SliceEntry& entry = problem.table()[static_cast<size_t>(adapter * p.slices.count + s)];
        const int rows = static_cast<int>(end - first);
        Element* v = v_.as<Element>() + first * problem.v_width() + entry.v_col;
        shrink.add({rows, entry.rank, static_cast<int>(c.k)}, static_cast<const Element*>(p.x) + first * p.x_stride,
                   p.x_stride, static_cast<const Element*>(p.slices.a[s]) + entry.a_row * p.slices.a_stride[s],
                   p.slices.a_stride[s], v, problem.v_width());
        expand.add({rows, p.slices.width[s], entry.rank}, v, problem.v_width(),
                   static_cast<const Element*>(p.slices.b[s]) + entry.b_offset, entry.b_stride,
                   static_cast<Element*>(p.y) + first * p.y_stride + p.slices.col[s], p.y_stride);
      }
      first = end;
    }
    steps_.push_back(std::unique_ptr<Step>(
        new Step{{shrink, 1, 0, "CUTLASS shrink"}, {expand, problem.table()[0].scale, 1, "CUTLASS expand"}}));
  }

  DeviceBuffer v_;  // [rows, v_width]
  std::vector<std::unique_ptr<Step>> steps_;
};

}  // namespace

std::unique_ptr<CutlassBaseline> make_cutlass_baseline(const Problem& problem) {
  const Case& c = problem.shape();
  bool serves = problem.dtype() == DType::kBFloat16 && problem.op() == Op::kLinear && !c.idle && c.k % kVector == 0 &&
                (c.order == RowOrder::kSegments || c.adapters == 1);
  for (const int32_t rank : c.ranks) serves = serves && rank % kVector == 0;
  for (const int32_t width : c.widths) serves = serves && width % kVector == 0;
  for (const SliceEntry& entry : problem.table()) {
    serves = serves && (entry.rank == 0 || entry.scale == problem.table()[0].scale);
  }
  return serves ? std::make_unique<GroupedBaseline>(problem) : nullptr;
}

}  // namespace polylora::bench
