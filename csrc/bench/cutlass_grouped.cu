// The 2.x grouped kernels: mma.sync with cp.async, tiles handed out by the device as the kernel runs. They are what a
// user of CUTLASS has for problems of a few rows; the sm_90 kernels start at tiles of 64 rows with TMA descriptors made
// on the device for every problem.
#include "grouped_gemm.h"

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include <vector>

#include "device.h"

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

// One grouped GEMM's problems, as the kernel wants them.
struct Operands {
  std::vector<GemmCoord> size;
  std::vector<const void*> x, w;
  std::vector<void*> y;
  std::vector<int64_t> x_pitch, w_pitch, y_pitch;

  explicit Operands(const std::vector<GemmProblem>& problems) {
    for (const GemmProblem& p : problems) {
      size.push_back({static_cast<int>(p.rows), static_cast<int>(p.n), static_cast<int>(p.k)});
      x.push_back(p.x);
      w.push_back(p.w);
      y.push_back(p.y);
      x_pitch.push_back(p.x_pitch);
      w_pitch.push_back(p.w_pitch);
      y_pitch.push_back(p.y_pitch);
    }
  }
};

template <typename Gemm>
int blocks_for(const std::vector<GemmCoord>& sizes, GemmBlocks blocks) {
  if (blocks == GemmBlocks::kResident) return Gemm::sufficient(sizes.data(), static_cast<int>(sizes.size()));
  int tiles = 0;
  for (const GemmCoord& size : sizes) tiles += Gemm::problem_tile_count(size);
  return tiles;
}

template <typename Gemm>
class Launch : public GroupedGemm {
 public:
  Launch(const Operands& host, const GemmConfig& config, const std::string& what)
      : what_(what),
        size_(upload(host.size, what)),
        x_(upload(host.x, what)),
        w_(upload(host.w, what)),
        y_(upload(host.y, what)),
        x_pitch_(upload(host.x_pitch, what)),
        w_pitch_(upload(host.w_pitch, what)),
        y_pitch_(upload(host.y_pitch, what)) {
    const int count = static_cast<int>(host.size.size());
    const int blocks = blocks_for<Gemm>(host.size, config.blocks);
    if (blocks <= 0) throw CudaError(cudaErrorInvalidConfiguration, what);
    const typename Gemm::Arguments arguments(size_.as<GemmCoord>(), count, blocks, {config.alpha, config.beta},
                                             x_.as<Element*>(), w_.as<Element*>(), y_.as<Element*>(), y_.as<Element*>(),
                                             x_pitch_.as<int64_t>(), w_pitch_.as<int64_t>(), y_pitch_.as<int64_t>(),
                                             y_pitch_.as<int64_t>());
    if (gemm_.initialize(arguments) != cutlass::Status::kSuccess) throw CudaError(cudaErrorInvalidValue, what);
  }

  void run(cudaStream_t stream) override {
    if (gemm_.run(stream) != cutlass::Status::kSuccess) throw CudaError(cudaErrorLaunchFailure, what_);
  }

 private:
  std::string what_;
  DeviceBuffer size_, x_, w_, y_, x_pitch_, w_pitch_, y_pitch_;
  Gemm gemm_;
};

// Few tiles with a long K, or many with a short one.
using LongK = Grouped<GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, 4>;
using ShortK = Grouped<GemmShape<64, 128, 32>, GemmShape<32, 64, 32>, 4>;

}  // namespace

bool has_cutlass() { return true; }

std::unique_ptr<GroupedGemm> make_grouped_gemm(const std::vector<GemmProblem>& problems, const GemmConfig& config,
                                               const std::string& what) {
  const Operands operands(problems);
  if (config.shape == GemmShapes::kLongK) return std::make_unique<Launch<LongK>>(operands, config, what);
  return std::make_unique<Launch<ShortK>>(operands, config, what);
}

}  // namespace polylora::bench
