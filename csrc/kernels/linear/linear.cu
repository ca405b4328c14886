// linear, shrink and expand: the fastest path that serves the call.
//
//   cluster  decode in one launch, 16-bit, aligned, 9.0 and later: linear_cluster.cu
//   wide     prefill, 16-bit, aligned: shrink_wgmma.cu on 9.0, else shrink_wide.cu; expand_wide.cu
//   mma      wide as a device of 8.0 runs it: shrink_wide.cu without clusters, expand_wide.cu
//   general  everything: shrink_general.cu, expand_general.cu
//
// POLYLORA_PATH forces one (an error where it does not serve the call); POLYLORA_BATCH_INVARIANT=1 takes one whose
// order of sums is the same for all batch sizes. Both are read at every call.
#include <cstdlib>
#include <cstring>

#include "linear/paths.h"
#include "linear/task.cuh"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

constexpr int64_t kDecodeRows = 256;

bool is_set(const char* text, const char* value) { return text && strcmp(text, value) == 0; }

enum class Path { kCluster, kWide, kMma, kGeneral };

// The path of a call for which `cluster` and `wide` say what serves it, best first.
cudaError_t choose(bool cluster, bool wide, Path& path) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  cluster = cluster && device.major >= 9;
  wide = wide && device.major >= 8;
  const char* forced = getenv("POLYLORA_PATH");
  if (forced && *forced) {
    if (is_set(forced, "general")) {
      path = Path::kGeneral;
    } else if (is_set(forced, "wide") || is_set(forced, "mma")) {
      path = is_set(forced, "wide") ? Path::kWide : Path::kMma;
      if (!wide) return cudaErrorNotSupported;
    } else if (is_set(forced, "cluster")) {
      path = Path::kCluster;
      if (!cluster) return cudaErrorNotSupported;
    } else {
      return cudaErrorInvalidValue;
    }
    return cudaSuccess;
  }
  path = cluster && !batch_invariant() ? Path::kCluster : wide ? Path::kWide : Path::kGeneral;
  return cudaSuccess;
}

cudaError_t choose_linear(const LoraParams& params, Path& path) {
  return choose(params.rows <= kDecodeRows && cluster_path_serves(params),
                wide_shrink_serves(params) && wide_expand_serves(params), path);
}

// Of shrink or expand, where `wide` serves it.
cudaError_t choose_half(bool wide, Path& path) {
  const bool cluster = is_set(getenv("POLYLORA_PATH"), "cluster");
  const cudaError_t error = choose(cluster, wide, path);
  if (error == cudaSuccess && path == Path::kCluster) path = wide ? Path::kWide : Path::kGeneral;
  return error;
}

}  // namespace

bool batch_invariant() { return is_set(getenv("POLYLORA_BATCH_INVARIANT"), "1"); }

cudaError_t linear_scratch(const LoraParams& params, int64_t& bytes) {
  Path path;
  const cudaError_t error = choose_linear(params, path);
  bytes = path == Path::kGeneral ? params.rows * params.v_width * int64_t{sizeof(float)} : 0;
  if (error != cudaSuccess || path == Path::kCluster || path == Path::kGeneral) return error;
  return wide_scratch(params, true, bytes);
}

cudaError_t linear(const LoraParams& params, cudaStream_t stream) {
  Path path;
  cudaError_t error = choose_linear(params, path);
  if (error != cudaSuccess) return error;
  if (path == Path::kCluster) return linear_cluster_path(params, stream);
  if (path != Path::kGeneral) {
    error = shrink_wide_path(params, path == Path::kMma, true, stream);
    return error == cudaSuccess ? expand_wide_path(params, true, stream) : error;
  }
  LoraParams with_v = params;
  with_v.v = static_cast<float*>(params.scratch);
  with_v.v_stride = params.v_width;
  error = shrink_general_path(with_v, stream);
  return error == cudaSuccess ? expand_general_path(with_v, stream) : error;
}

// The halves have no path of their own for decode: forcing that of linear forces none here.
cudaError_t shrink_scratch(const LoraParams& params, int64_t& bytes) {
  Path path;
  const cudaError_t error = choose_half(wide_shrink_serves(params), path);
  bytes = 0;
  return error == cudaSuccess && path != Path::kGeneral ? wide_scratch(params, false, bytes) : error;
}

cudaError_t shrink(const LoraParams& params, cudaStream_t stream) {
  Path path;
  const cudaError_t error = choose_half(wide_shrink_serves(params), path);
  if (error != cudaSuccess) return error;
  if (path == Path::kGeneral) return shrink_general_path(params, stream);
  return shrink_wide_path(params, path == Path::kMma, false, stream);
}

cudaError_t expand(const LoraParams& params, cudaStream_t stream) {
  Path path;
  const cudaError_t error = choose_half(wide_expand_serves(params), path);
  if (error != cudaSuccess) return error;
  return path == Path::kGeneral ? expand_general_path(params, stream) : expand_wide_path(params, false, stream);
}

}  // namespace polylora::cuda
