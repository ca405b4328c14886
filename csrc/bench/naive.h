// The op in its plainest form: the reference that results are checked against, and a baseline. It shares the
// parameters' meaning with the library and no code: neither plan nor index math.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace polylora::bench {

/// v = x A^T, or A[:, token]: [rows, v_width] in fp64, from the same 16-bit inputs. Rows and ranks that no adapter has
/// keep their values.
void reference_shrink(const Problem& problem, int64_t call, double* v, cudaStream_t stream);

/// The same of any rows: `row_group` [rows] is the group of each, v has a pitch of lora.v_width.
void reference_shrink(const LoraParams& lora, const int32_t* row_group, double* v, cudaStream_t stream);

/// delta += scale * v B^T, [rows, width]; v as above.
void reference_expand(const Problem& problem, int64_t call, const double* v, float* delta, cudaStream_t stream);

/// The same from the call's own fp32 v: what the expand op is given.
void reference_expand_given(const Problem& problem, int64_t call, float* delta, cudaStream_t stream);

/// A baseline: two kernels, fp32 sums, a warp a value of v, a thread an output.
class NaiveBaseline {
 public:
  explicit NaiveBaseline(const Problem& problem);
  cudaError_t run(int64_t call, cudaStream_t stream) const;

 private:
  const Problem& problem_;
  DeviceBuffer v_;  // [rows, v_width] fp32
};

}  // namespace polylora::bench
