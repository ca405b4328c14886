// What the op adds to a chain of base layers: [GEMM, op] x n against the GEMMs alone.
#pragma once

#include <functional>
#include <string>

#include "cublas.h"
#include "problem.h"
#include "timing.h"
#include "verify.h"

namespace polylora::bench {

/// Enqueues layer number `call` of a chain: `gemm`, which enqueues the base's, and what the op does after or beside it.
using Layer = std::function<void(int64_t call, cudaStream_t stream, const std::function<void()>& gemm)>;

/// The op after the GEMM.
Layer after_gemm(const Implementation& run);

class Chain {
 public:
  Chain(const Problem& problem, const Cublas& cublas, const Device& device, cudaStream_t stream);

  /// Two layers in a graph; the last one's y against the GEMM's alone + delta.
  Verdict verify_chain(const Layer& layer, cudaStream_t stream) const;

  AddedTiming time(const Layer& layer, const TimingOptions& options, cudaStream_t stream) const;

 private:
  void enqueue_base(int64_t call) const;
  void enqueue(const Layer& layer, int64_t call, cudaStream_t stream) const;

  const Problem& problem_;
  const Cublas& cublas_;
  int64_t base_bytes_;  // of one W
  int64_t bases_;       // that many, so that a W is cold when its turn comes again
  DeviceBuffer w_;      // [bases, n, k]
  DeviceBuffer x_;      // [rows, k]: an expand op has none of its own
};

}  // namespace polylora::bench
