// Is the result right? Asked of every case and path before it is timed.
#pragma once

#include <functional>
#include <string>

#include "problem.h"
#include "verdict.h"

namespace polylora::bench {

/// Enqueues call number `call` of an implementation under test.
using Implementation = std::function<cudaError_t(int64_t call, cudaStream_t stream)>;

/// Runs one call, then a captured chain of calls on the same y, against the reference: where a call reads what the call
/// before has not finished, only the chain shows it. Throws CudaError where a call fails.
Verdict verify(const Problem& problem, const Implementation& run, cudaStream_t stream);

/// y must be y before + delta; `y_before` [rows, width] in the problem's type, delta fp32.
Verdict compare_y(const Problem& problem, const void* y, const void* y_before, const float* delta, cudaStream_t stream);

/// delta [rows, width] += that of call number `call`, by the reference.
void add_reference_delta(const Problem& problem, int64_t call, float* delta, cudaStream_t stream);

}  // namespace polylora::bench
