// Are the base layer and the ops right? Every stage of a forward, from what the stage before it left, against kernels
// that sum in fp64 and read neither the plan nor any code of the library.
#pragma once

#include "moe_base.h"
#include "moe_lora.h"
#include "verdict.h"

namespace polylora::bench {

/// The base's forward of the first and of the last call; of its GEMMs some rows, evenly spaced.
Verdict verify_base(const MoeProblem& problem, const MoeBase& base, cudaStream_t stream);

/// One forward, then all of problem.layers() in a captured graph, whose last one is checked: where a call reads what
/// the call before has not finished, only the chain shows it. Buffers, plan and scratch hold NaN before. The error of
/// an (adapter, expert) is ||result - reference|| / ||reference|| over its rows, that of a sum a token's; the largest
/// counts. Throws CudaError where a call fails.
Verdict verify_lora(const MoeProblem& problem, MoeLora& lora, cudaStream_t stream);

}  // namespace polylora::bench
