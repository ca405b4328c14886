// linear, shrink, expand and embedding: the fastest path that serves the call.
//
//   cluster  decode in one launch, 16-bit, aligned, 9.0 and later: linear_cluster.cu
//   wide     prefill in one launch, 16-bit, aligned, 9.0: linear_wide.cu
//   mma      prefill as a device of 8.0 runs it: shrink_wide.cu, expand_wide.cu
//   general  everything: *_general.cu
//
// shrink on its own knows wide, mma and general; expand and embedding mma and general.
//
// POLYLORA_PATH forces one (an error where it does not serve the call; for the halves and embedding, which have fewer,
// the next in the list that they have); POLYLORA_BATCH_INVARIANT=1 takes one whose order of sums is the same for all
// batch sizes. Both are read at every call.
#include <cstdlib>
#include <cstring>

#include "linear/paths.h"
#include "linear/wide.cuh"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

constexpr int64_t kDecodeRows = 256;

bool is_set(const char* text, const char* value) { return text && strcmp(text, value) == 0; }

enum class Path { kCluster, kWide, kMma, kGeneral };
constexpr const char* kNames[] = {"cluster", "wide", "mma", "general"};

// Which paths serve a call.
struct Served {
  bool path[4];
};

// `has`: the paths that the op has at all.
cudaError_t choose(Served serves, Served has, Path& path) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool able[] = {device.major >= 9, device.major == 9, device.major >= 8, true};
  const char* forced = getenv("POLYLORA_PATH");
  const bool is_forced = forced != nullptr && *forced != 0;
  int first = 0;
  if (is_forced) {
    for (first = 0; first < 4 && !is_set(forced, kNames[first]);) ++first;
    if (first == 4) return cudaErrorInvalidValue;
    while (!has.path[first]) ++first;
  }
  for (int i = first; i < 4; ++i) {
    if (has.path[i] && serves.path[i] && able[i]) {
      path = static_cast<Path>(i);
      return cudaSuccess;
    }
    if (is_forced) break;
  }
  return cudaErrorNotSupported;
}

cudaError_t choose_linear(const LoraParams& params, Path& path) {
  const bool cluster = params.rows <= kDecodeRows && !batch_invariant() && cluster_path_serves(params);
  const bool wide = wide_shrink_serves(params) && wide_expand_serves(params);
  return choose({{cluster, wide, wide, true}}, {{true, true, true, true}}, path);
}

cudaError_t choose_shrink(const LoraParams& params, Path& path) {
  const bool wide = wide_shrink_serves(params);
  return choose({{false, wide, wide, true}}, {{false, true, true, true}}, path);
}

}  // namespace

bool batch_invariant() { return is_set(getenv("POLYLORA_BATCH_INVARIANT"), "1"); }

cudaError_t linear_scratch(const LoraParams& params, int64_t& bytes) {
  Path path;
  cudaError_t error = choose_linear(params, path);
  bytes = 0;
  if (error != cudaSuccess || path == Path::kCluster) return error;
  if (path == Path::kWide) return wide_scratch(params, bytes);
  if (path == Path::kGeneral) {
    bytes = params.rows * params.v_width * int64_t{sizeof(float)};
    return cudaSuccess;
  }
  int parts = 0;
  error = mma_parts(params, parts);
  bytes = plane_bytes(params, parts);
  return error;
}

cudaError_t linear(const LoraParams& params, cudaStream_t stream) {
  Path path;
  cudaError_t error = choose_linear(params, path);
  if (error != cudaSuccess) return error;
  if (path == Path::kCluster) return linear_cluster_path(params, stream);
  if (path == Path::kWide) return linear_wide_path(params, stream);
  if (path == Path::kMma) {
    int parts = 0;
    error = mma_parts(params, parts);
    if (error == cudaSuccess) error = shrink_mma_path(params, parts, stream);
    return error == cudaSuccess ? expand_wide_path(params, parts, stream) : error;
  }
  LoraParams with_v = params;
  with_v.v = static_cast<float*>(params.scratch);
  with_v.v_stride = params.v_width;
  error = shrink_general_path(with_v, stream);
  return error == cudaSuccess ? expand_general_path(with_v, stream) : error;
}

cudaError_t shrink_scratch(const LoraParams& params, int64_t& bytes) {
  Path path;
  cudaError_t error = choose_shrink(params, path);
  bytes = 0;
  if (error != cudaSuccess || path == Path::kGeneral) return error;
  if (path == Path::kWide) return wide_scratch(params, bytes);
  int parts = 0;
  error = mma_parts(params, parts);
  if (parts > 1) bytes = plane_bytes(params, parts);
  return error;
}

cudaError_t shrink(const LoraParams& params, cudaStream_t stream) {
  Path path;
  cudaError_t error = choose_shrink(params, path);
  if (error != cudaSuccess) return error;
  if (path == Path::kWide) return linear_wide_path(params, stream);
  if (path == Path::kGeneral) return shrink_general_path(params, stream);
  int parts = 0;
  error = mma_parts(params, parts);
  if (error == cudaSuccess) error = shrink_mma_path(params, parts > 1 ? parts : 0, stream);
  return error == cudaSuccess && parts > 1 ? add_planes_path(params, parts, stream) : error;
}

cudaError_t expand(const LoraParams& params, cudaStream_t stream) {
  Path path;
  const cudaError_t error =
      choose({{false, false, wide_expand_serves(params), true}}, {{false, false, true, true}}, path);
  if (error != cudaSuccess) return error;
  return path == Path::kGeneral ? expand_general_path(params, stream) : expand_wide_path(params, 0, stream);
}

cudaError_t embedding(const EmbeddingParams& params, cudaStream_t stream) {
  Path path;
  const cudaError_t error =
      choose({{false, false, wide_embedding_serves(params), true}}, {{false, false, true, true}}, path);
  if (error != cudaSuccess) return error;
  return path == Path::kGeneral ? embedding_general_path(params, stream) : embedding_wide_path(params, stream);
}

}  // namespace polylora::cuda
