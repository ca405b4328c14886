// linear: the fastest path that serves the call.
//
//   cluster  decode, up to 256 rows, 16-bit, aligned, 9.0 and later: linear_cluster.cu
//   general  everything: shrink_general.cu, expand_general.cu
//
// POLYLORA_PATH forces one (an error where it does not serve the call); POLYLORA_BATCH_INVARIANT=1 takes the one whose
// order of sums is the same for all batch sizes. Both are read at every call.
#include <cstdlib>
#include <cstring>

#include "linear/paths.h"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

// Whether the current device has clusters (9.0 and later).
bool has_clusters() {
  constexpr int kMaxDevices = 64;
  static int8_t known[kMaxDevices] = {};  // 0: not asked yet; a race writes the same answer twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  if (known[device] == 0) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    known[device] = major >= 9 ? 1 : -1;
  }
  return known[device] > 0;
}

bool is_set(const char* text, const char* value) { return text && strcmp(text, value) == 0; }

}  // namespace

cudaError_t linear(const LoraParams& params, cudaStream_t stream) {
  constexpr int64_t kDecodeRows = 256;
  const char* forced = getenv("POLYLORA_PATH");
  const bool served = params.rows <= kDecodeRows && cluster_path_serves(params) && has_clusters();
  if (is_set(forced, "cluster") && !served) return cudaErrorNotSupported;
  if (forced && *forced && !is_set(forced, "cluster") && !is_set(forced, "general")) return cudaErrorInvalidValue;
  // one order of sums for all batch sizes: the general kernels
  const bool general = is_set(forced, "general") || is_set(getenv("POLYLORA_BATCH_INVARIANT"), "1");
  if (served && !general) return linear_cluster_path(params, stream);
  const cudaError_t error = shrink(params, stream);
  return error == cudaSuccess ? expand(params, stream) : error;
}

}  // namespace polylora::cuda
