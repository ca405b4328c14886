// moe_gate_up_, moe_down_, moe_gate_up_act, moe_down_reduce, moe_delta, moe_act, moe_reduce: the path that serves the
// call.
//
//   mma      streams of weights, 16-bit, aligned, 8.0 and later: moe_stream.cu; few rows without experts: act_narrow.cu
//   general  everything: shrink_general.cu, expand_general.cu, *_general.cu
#include "common/choose.h"
#include "linear/narrow.cuh"
#include "linear/paths.h"
#include "moe/paths.h"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

cudaError_t choose_moe(bool serves, Path& path) {
  return choose({{false, false, serves, true}}, {{false, false, true, true}}, path, Path::kMma);
}

// Without outputs a seam is done before a path is chosen, and needs no scratch.
bool writes_nothing(const GateUpActParams& g) { return g.lora.rows == 0 || g.lora.slices.width[0] == 0; }
bool writes_nothing(const DownReduceParams& d) { return d.tokens == 0 || d.lora.slices.width[0] == 0; }

// A call without rows or groups launches neither shrink nor expand, whose order the streams' seams rely on, and has no
// table to read.
cudaError_t choose_seam(const LoraParams& p, bool serves, Path& path) {
  return choose_moe(serves && !adds_nothing(p), path);
}

// A dense MLP's gate and up go by linear's kernels for few rows, also where linear itself has others for more (is_few):
// MoE's streams, the other choice here, are slower. H200, 4096 -> 2 x 14336, 8 adapters r64, act_narrow and MoE's, us:
// 64 rows 20.3 and 29.1, 128 rows 27.0 and 105.7, 256 rows 31.0 and 132.9, 1024 rows 77.2 and 215.
bool is_decode_of_mlp(const GateUpActParams& g) {
  return act_narrow_serves(g) && g.lora.rows <= kMostDecodeRows && !batch_invariant();
}

// Whether deltas are made by linear's kernels for few rows. H200, us added to a layer beside SGLang's GEMMs, so and by
// streams: qwen35-397b r16, 10 pairs a token, M1 1.5 and 9.0, M2 3.0 and 11.9, M4 13.7 and 2.9, M8 15.9 and 10.4;
// qwen35-35b r16, 8 a token, M1 1.3 and 2.7, M2 1.4 and 5.4, M4 7.0 and 7.5, M8 10.7 and 14.2; nemotron3-super r16, 22
// a token, M1 -1.1 and 1.6, M2 7.5 and 2.3, M4 8.2 and 4.1, r64 M1 0.3 and 5.1, M2 15.9 and 10.7.
constexpr int64_t kFewPairs = 32;
bool has_few_pairs(const LoraParams& p) { return p.rows <= kFewPairs && few_deltas_serve(p) && !batch_invariant(); }

// Zeros in the first `width` bytes of each row. cudaMemset2D takes no pitch of 2 GiB and more; of such rows there are
// few.
cudaError_t zero_rows(void* to, int64_t pitch, int64_t width, int64_t rows, cudaStream_t stream) {
  if (rows == 1 || pitch == width) return cudaMemsetAsync(to, 0, static_cast<size_t>(rows * width), stream);
  if (pitch <= INT32_MAX) {
    return cudaMemset2DAsync(to, static_cast<size_t>(pitch), 0, static_cast<size_t>(width), static_cast<size_t>(rows),
                             stream);
  }
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < rows && error == cudaSuccess; ++row) {
    error = cudaMemsetAsync(static_cast<char*>(to) + row * pitch, 0, static_cast<size_t>(width), stream);
  }
  return error;
}

}  // namespace

cudaError_t moe_scratch(const LoraParams& p, int64_t& bytes) {
  Path path;
  const cudaError_t error = choose_moe(moe_stream_serves(p), path);
  bytes = v_bytes(p);
  return error == cudaSuccess && path == Path::kMma ? moe_linear_scratch(p, bytes) : error;
}

cudaError_t moe_linear(const LoraParams& p, cudaStream_t stream) {
  Path path;
  const cudaError_t error = choose_moe(moe_stream_serves(p), path);
  if (error != cudaSuccess) return error;
  return (path == Path::kMma ? moe_linear_path : linear_general_path)(p, stream);
}

cudaError_t gate_up_act_scratch(const GateUpActParams& g, int64_t& bytes) {
  bytes = 0;
  if (writes_nothing(g)) return cudaSuccess;
  Path path;
  const cudaError_t error = choose_seam(g.lora, moe_act_serves(g), path);
  bytes = v_bytes(g.lora);
  if (error != cudaSuccess || path != Path::kMma) return error;
  return (is_decode_of_mlp(g) ? act_narrow_scratch : moe_gate_up_act_scratch)(g, bytes);
}

cudaError_t gate_up_act(const GateUpActParams& g, cudaStream_t stream) {
  if (writes_nothing(g)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_seam(g.lora, moe_act_serves(g), path);
  if (error != cudaSuccess) return error;
  if (path == Path::kMma) return (is_decode_of_mlp(g) ? act_narrow_path : moe_gate_up_act_path)(g, stream);
  GateUpActParams general = g;
  general.lora = with_v_in_scratch(g.lora);
  if (!adds_nothing(g.lora)) error = shrink_general_path(general.lora, stream);
  return error == cudaSuccess ? gate_up_act_general_path(general, stream) : error;
}

cudaError_t down_reduce_scratch(const DownReduceParams& d, int64_t& bytes) {
  bytes = 0;
  if (writes_nothing(d)) return cudaSuccess;
  Path path;
  const cudaError_t error = choose_seam(d.lora, moe_reduce_serves(d), path);
  bytes = v_bytes(d.lora);
  return error == cudaSuccess && path == Path::kMma ? moe_down_reduce_scratch(d, bytes) : error;
}

cudaError_t down_reduce(const DownReduceParams& d, cudaStream_t stream) {
  if (writes_nothing(d)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_seam(d.lora, moe_reduce_serves(d), path);
  if (error != cudaSuccess) return error;
  if (path == Path::kMma) return moe_down_reduce_path(d, stream);
  DownReduceParams general = d;
  general.lora = with_v_in_scratch(d.lora);
  if (!adds_nothing(d.lora)) error = shrink_general_path(general.lora, stream);
  return error == cudaSuccess ? down_reduce_general_path(general, stream) : error;
}

cudaError_t moe_delta_scratch(const LoraParams& p, int64_t& bytes) {
  Path path;
  const cudaError_t error = choose_moe(moe_stream_serves(p), path);
  bytes = p.v_of_x ? 0 : v_bytes(p);
  if (error != cudaSuccess || path != Path::kMma) return error;
  return (has_few_pairs(p) ? few_deltas_scratch : moe_deltas_scratch)(p, bytes);
}

cudaError_t moe_delta(const LoraParams& p, cudaStream_t stream) {
  if (adds_nothing(p)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_moe(moe_stream_serves(p), path);
  if (error != cudaSuccess) return error;
  if (path == Path::kMma) return (has_few_pairs(p) ? few_deltas_path : moe_delta_path)(p, stream);
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t width = sum_of_widths(p.slices);
  if (width == 0) return cudaSuccess;
  error = zero_rows(p.y, p.y_stride * element, width * element, p.rows, stream);
  if (error != cudaSuccess) return error;
  return (p.v_of_x ? expand_general_path : linear_general_path)(p, stream);
}

cudaError_t moe_act(const GateUpActParams& g, cudaStream_t stream) {
  if (writes_nothing(g)) return cudaSuccess;
  Path path;
  const cudaError_t error = choose_moe(moe_add_act_serves(g), path);
  if (error != cudaSuccess) return error;
  return (path == Path::kMma ? moe_add_act_path : gate_up_act_general_path)(g, stream);
}

cudaError_t moe_reduce(const DownReduceParams& d, cudaStream_t stream) {
  if (writes_nothing(d)) return cudaSuccess;
  Path path;
  const cudaError_t error = choose_moe(moe_add_reduce_serves(d), path);
  if (error != cudaSuccess) return error;
  return (path == Path::kMma ? moe_add_reduce_path : down_reduce_general_path)(d, stream);
}

}  // namespace polylora::cuda
