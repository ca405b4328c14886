// MoE's ops by streams of weights, put together from moe_shrink.cu and what comes after it:
//
//   gate/up and down in place  moe_expand.cu
//   gate/up and activation     moe_expand.cu
//   down and sum               few tokens: moe_down_few.cu; else moe_expand.cu and moe_sum.cu in turn
//   deltas alone               moe_expand.cu; what adds them: moe_act.cu (many: moe_act_long.cu), moe_sum.cu
//
// Of long runs, moe_shrink_long.cu takes the place of moe_shrink.cu (9.0a), and moe_expand_long.cu makes the activation
// and the deltas. Of runs of a middling length, moe_expand_middle.cu takes the place of moe_expand.cu.
#include "linear/paths.h"
#include "moe/paths.h"
#include "moe/stream.cuh"

namespace polylora::cuda {
namespace {

// (token, expert) pairs up to which down reads each pair's B for its token: two launches instead of three.
constexpr int64_t kFewPairs = 256;
constexpr int64_t kFewRanks = 256;  // of all pairs of a token: every block of it adds up their v

// Deltas that are on their way from moe_expand.cu to moe_sum.cu at once: they are to stay in L2.
constexpr int64_t kDeltaBytes = int64_t{40} << 20;

bool is_few(const DownReduceParams& d) {
  const bool few = d.tokens * d.top_k <= kFewPairs && d.top_k * even_rank(d.lora) <= kFewRanks;
  return few && d.top_k <= kFewTokenPairs && !batch_invariant();
}

// Outputs of which deltas are made at once: what a block of its kernel makes, or a multiple.
int32_t delta_columns(const DownReduceParams& d) {
  const int64_t step = moe_expand_long_serves(d.lora, 0) ? 128 : 256;
  const int64_t width = d.lora.slices.width[0];
  const int64_t fit = kDeltaBytes / (2 * (d.lora.rows < 1 ? 1 : d.lora.rows)) / step * step;
  if (fit >= width) return static_cast<int32_t>(width);
  const int64_t passes = divide_up(width, fit < step ? step : fit);
  return static_cast<int32_t>(divide_up(divide_up(width, passes), 8) * 8);
}

// Blocks an SM of the kernels that make deltas beside a GEMM of the base: what they take of registers and shared memory
// that has not. H200, us added to the layer by one and by three: qwen35-35b r16 M64 30, 43, M256 87, 97; by one and by
// two: r64 M64 105, 112, but r64 M256 338, 308, where the deltas take longer than the GEMM.
int blocks_beside(const LoraParams& p) {
  constexpr int64_t kMuch = int64_t{512} << 20;  // bytes of weights
  const int64_t elements_a_rank = (p.v_of_x ? 0 : p.k * p.slices.count) + sum_of_widths(p.slices);
  return 2 * plan_max_runs(p.rows, p.slices.groups) * even_rank(p) * elements_a_rank > kMuch ? 2 : 1;
}

// What all but a given v begin with, and how it shares K.
struct Shrink {
  decltype(&moe_planes) planes;
  decltype(&moe_shrink_path) path;
};
Shrink shrink_of(const LoraParams& p) {
  return moe_shrink_long_serves(p) ? Shrink{moe_long_planes, moe_shrink_long_path}
                                   : Shrink{moe_planes, moe_shrink_path};
}

int64_t plane_bytes_aligned(const LoraParams& p, int planes) { return divide_up(moe_plane_bytes(p, planes), 16) * 16; }

bool interleaved(const SliceSet& slices) {
  return slices.col_stride == 2 && slices.count == 2 && slices.col[1] == slices.col[0] + 1;
}

// What moe_shrink.cu asks of x and A.
bool shrink_serves(const LoraParams& p) {
  if (p.k % 8 != 0 || p.k > 1 << 24 || p.x_stride % 8 != 0 || p.x_stride > INT32_MAX || !is_aligned(p.x, 16))
    return false;
  // pieces of x are counted in 32 bits
  const int64_t pairs = p.plan.pairs > 0 ? p.plan.pairs : p.rows;
  if ((p.x_div > 0 ? divide_up(pairs, p.x_div) : p.rows) * (p.x_stride / 8) >= UINT32_MAX) return false;
  for (int s = 0; s < p.slices.count; ++s) {
    const int64_t stride = p.slices.a_stride[s];
    if (!is_aligned(p.slices.a[s], 16) || stride % 8 != 0 || stride > INT32_MAX) return false;
  }
  return true;
}

}  // namespace

bool moe_stream_serves(const LoraParams& p) {
  const SliceSet& slices = p.slices;
  if (p.dtype == DType::kFloat32 || slices.count > kStreamSlices) return false;
  if (!p.v_of_x && !shrink_serves(p)) return false;
  if (p.y_stride % 8 != 0 || p.y_stride > INT32_MAX || !is_aligned(p.y, 16)) return false;
  if (!is_aligned(p.plan.header, 16) || !is_aligned(slices.table, 16)) return false;
  for (int s = 0; s < slices.count; ++s) {
    if (!is_aligned(slices.b[s], 16) || slices.width[s] % 8 != 0 || slices.width[s] != slices.width[0]) return false;
    if (slices.col_stride == 1 && slices.col[s] % 8 != 0) return false;
  }
  return slices.col_stride == 1 || (interleaved(slices) && slices.col[0] % 8 == 0);
}

bool moe_act_serves(const GateUpActParams& g) {
  return moe_stream_serves(g.lora) && g.h_stride % 8 == 0 && is_aligned(g.h, 16);
}

bool moe_reduce_serves(const DownReduceParams& d) {
  return moe_stream_serves(d.lora) && d.out_stride % 8 == 0 && is_aligned(d.out, 16);
}

bool moe_add_act_serves(const GateUpActParams& g) {
  constexpr int32_t kMostWidth = 65535 * 128;  // outputs, 128 a block in the grid's y
  return moe_act_serves(g) && g.lora.slices.width[0] <= kMostWidth && g.delta_stride % 8 == 0 &&
         is_aligned(g.delta, 16);
}

bool moe_add_reduce_serves(const DownReduceParams& d) {
  return moe_reduce_serves(d) && d.delta_stride % 8 == 0 && is_aligned(d.delta, 16);
}

cudaError_t moe_linear_scratch(const LoraParams& p, int64_t& bytes) {
  int planes = 0;
  const cudaError_t error = shrink_of(p).planes(p, kAllBlocks, planes);
  bytes = plane_bytes_aligned(p, planes);
  return error;
}

namespace {

// Sets how K was shared.
cudaError_t shrink(const LoraParams& p, int& planes, cudaStream_t stream, int most_blocks = kAllBlocks) {
  const Shrink how = shrink_of(p);
  const cudaError_t error = how.planes(p, most_blocks, planes);
  return error == cudaSuccess ? how.path(p, planes, most_blocks, stream) : error;
}

}  // namespace

cudaError_t moe_linear_path(const LoraParams& p, cudaStream_t stream) {
  int planes = 0;
  const cudaError_t error = shrink(p, planes, stream);
  if (error != cudaSuccess) return error;
  return (moe_expand_middle_serves(p) ? moe_expand_middle_add_path : moe_expand_add_path)(p, planes, stream);
}

cudaError_t moe_gate_up_act_scratch(const GateUpActParams& g, int64_t& bytes) {
  return moe_linear_scratch(g.lora, bytes);
}

cudaError_t moe_gate_up_act_path(const GateUpActParams& g, cudaStream_t stream) {
  if (g.lora.rows == 0) return cudaSuccess;
  int planes = 0;
  const cudaError_t error = shrink(g.lora, planes, stream);
  if (error != cudaSuccess) return error;
  const bool is_long = g.lora.slices.col_stride == 1 && moe_expand_long_serves(g.lora, g.h_stride);
  return (is_long                            ? moe_expand_long_act_path
          : moe_expand_middle_serves(g.lora) ? moe_expand_middle_act_path
                                             : moe_expand_act_path)(g, planes, stream);
}

cudaError_t moe_deltas_scratch(const LoraParams& p, int64_t& bytes) {
  int planes = 0;
  bytes = 0;
  if (p.v_of_x) return cudaSuccess;
  const cudaError_t error = shrink_of(p).planes(p, blocks_beside(p), planes);
  bytes = moe_plane_bytes(p, planes);
  return error;
}

cudaError_t moe_delta_path(const LoraParams& p, cudaStream_t stream) {
  const int most_blocks = blocks_beside(p);
  if (p.v_of_x) return moe_expand_deltas_path(p, 0, most_blocks, stream);
  int planes = 0;
  const cudaError_t error = shrink(p, planes, stream, most_blocks);
  if (error != cudaSuccess) return error;
  return (moe_expand_long_serves(p, p.y_stride) ? moe_expand_long_deltas_path
          : moe_expand_middle_serves(p)         ? moe_expand_middle_deltas_path
                                                : moe_expand_deltas_path)(p, planes, most_blocks, stream);
}

cudaError_t moe_down_reduce_scratch(const DownReduceParams& d, int64_t& bytes) {
  const cudaError_t error = moe_linear_scratch(d.lora, bytes);
  if (!is_few(d)) bytes += d.lora.rows * delta_columns(d) * 2;
  return error;
}

cudaError_t moe_down_reduce_path(const DownReduceParams& d, cudaStream_t stream) {
  if (d.tokens == 0) return cudaSuccess;
  int planes = 0;
  cudaError_t error = shrink(d.lora, planes, stream);
  if (error != cudaSuccess) return error;
  if (is_few(d)) return moe_down_few_path(d, planes, stream);
  void* delta = static_cast<char*>(d.lora.scratch) + plane_bytes_aligned(d.lora, planes);
  const int32_t width = d.lora.slices.width[0];
  const int32_t step = delta_columns(d);
  const auto make_deltas = moe_expand_long_serves(d.lora, step) ? moe_expand_long_delta_path
                           : moe_expand_middle_serves(d.lora)   ? moe_expand_middle_delta_path
                                                                : moe_expand_delta_path;
  for (int32_t n = 0; n < width && error == cudaSuccess; n += step) {
    const int32_t end = n + step < width ? n + step : width;
    error = make_deltas(d.lora, planes, delta, n, end, stream);
    if (error == cudaSuccess) error = moe_sum_path(d, delta, n, end, stream);
  }
  return error;
}

}  // namespace polylora::cuda
