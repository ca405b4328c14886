// What the op adds to a chain of base layers: [GEMM, op] x n against the GEMMs alone.
#pragma once

#include <string>

#include "cublas.h"
#include "problem.h"
#include "timing.h"
#include "verify.h"

namespace polylora::bench {

class Chain {
 public:
  Chain(const Problem& problem, const Cublas& cublas, const Device& device, cudaStream_t stream);

  /// Two pairs in a graph; the last pair's y against the GEMM's alone + delta.
  Verdict verify_chain(const Implementation& run, cudaStream_t stream) const;

  AddedTiming time(const Implementation& run, const TimingOptions& options, cudaStream_t stream) const;

 private:
  void enqueue_base(int64_t call) const;

  const Problem& problem_;
  const Cublas& cublas_;
  int64_t base_bytes_;  // of one W
  int64_t bases_;       // that many, so that a W is cold when its turn comes again
  DeviceBuffer w_;      // [bases, n, k]
  DeviceBuffer x_;      // [rows, k]: an expand op has none of its own
};

}  // namespace polylora::bench
