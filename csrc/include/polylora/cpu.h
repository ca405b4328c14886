// The ops on the CPU: the reference, the path of CI and of laptops. Same params as CUDA, all pointers host memory.
#pragma once

#include <cstdint>
#include <functional>

#include "polylora/params.h"

namespace polylora::cpu {

/// Runs body(begin, end) over disjoint parts of [0, n), each of at least `grain` items, in any order, and waits.
/// The caller brings its thread pool (the torch binding passes torch's; tests pass a serial one).
using ParallelFor =
    std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

void plan(const PlanParams& params, const ParallelFor& parallel_for);
void moe_plan(const MoePlanParams& params, const ParallelFor& parallel_for);

void shrink(const LoraParams& params, const ParallelFor& parallel_for);
void expand(const LoraParams& params, const ParallelFor& parallel_for);
/// y is delta; v given, also of x. `absent`: what stands where a slice is absent, 0 or -0.
void delta(const LoraParams& params, float absent, const ParallelFor& parallel_for);
void add_delta(const AddDeltaParams& params, const ParallelFor& parallel_for);
void embedding(const EmbeddingParams& params, const ParallelFor& parallel_for);  // looks A up and expands; no v

void gate_up_act(const GateUpActParams& params, const ParallelFor& parallel_for);   // v given
void down_reduce(const DownReduceParams& params, const ParallelFor& parallel_for);  // v given

void moe_act(const GateUpActParams& params, const ParallelFor& parallel_for);
void moe_reduce(const DownReduceParams& params, const ParallelFor& parallel_for);

}  // namespace polylora::cpu
