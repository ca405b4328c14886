#include <cuda_bf16.h>

#include "moe_base.h"
#include "polylora/activation.h"

namespace polylora::bench {
namespace {

using Element = __nv_bfloat16;
constexpr int kThreads = 128;
constexpr int kVector = 8;  // elements of a 16-byte access
constexpr int kFew = 2;     // of a 4-byte one: where there is little to share, more threads share it

template <int kCount>
struct alignas(kCount * sizeof(Element)) Piece {
  Element value[kCount];
};

// A block takes a row: that of the token whose pair stands there.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const uint4* x, const int32_t* row_map, int top_k, int64_t pieces, uint4* sorted) {
  const int64_t row = blockIdx.x;
  const uint4* from = x + row_map[row] / top_k * pieces;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) sorted[row * pieces + i] = from[i];
}

struct ActArgs {
  const Element* y1;  // [pairs, slices * inner]
  Element* h;         // [pairs, inner]
  int64_t pairs, inner;
  Activation act;
  bool gated, interleaved;
};

// A thread takes 8 outputs.
__global__ void __launch_bounds__(kThreads) act_kernel(const ActArgs args) {
  const int64_t pieces = args.inner / kVector;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= args.pairs * pieces) return;
  const int64_t row = at / pieces;
  const int64_t column = at % pieces * kVector;
  const Element* y1 = args.y1 + row * args.inner * (args.gated ? 2 : 1);
  // of gate and up side by side one piece each, of interleaved ones two that follow one another
  const auto load = [&](int64_t from) { return *reinterpret_cast<const Piece<kVector>*>(y1 + from); };
  const Piece<kVector> first = load(args.interleaved ? 2 * column : column);
  const Piece<kVector> second =
      !args.gated ? first : load(args.interleaved ? 2 * column + kVector : args.inner + column);
  Piece<kVector> h;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (!args.gated) {
      h.value[i] = static_cast<Element>(activation(args.act, static_cast<float>(first.value[i])));
      continue;
    }
    const Piece<kVector>& half = i < kVector / 2 ? first : second;
    const int pair = i * 2 % kVector;
    const auto gate = static_cast<float>(args.interleaved ? half.value[pair] : first.value[i]);
    const auto up = static_cast<float>(args.interleaved ? half.value[pair + 1] : second.value[i]);
    h.value[i] = static_cast<Element>(gated_activation(args.act, gate, up, kActAlpha, kActLimit));
  }
  *reinterpret_cast<Piece<kVector>*>(args.h + row * args.inner + column) = h;
}

struct SumArgs {
  const Element* y2;        // [pairs, hidden]
  const int32_t* position;  // [rows, top_k]
  const float* weights;     // [rows, top_k]
  Element* out;             // [rows, hidden]
  int64_t hidden;
  int32_t top_k;
  int32_t parts;  // blocks that share a token
};

// A thread takes kCount outputs of a token.
template <int kCount>
__global__ void __launch_bounds__(kThreads) sum_kernel(const SumArgs args) {
  const int64_t token = blockIdx.x / static_cast<unsigned>(args.parts);
  const int64_t column = (int64_t{blockIdx.x} % args.parts * kThreads + threadIdx.x) * kCount;
  if (column >= args.hidden) return;
  float sum[kCount] = {};
#pragma unroll 4
  for (int j = 0; j < args.top_k; ++j) {
    const int64_t pair = token * args.top_k + j;
    const float weight = __ldg(args.weights + pair);
    const Element* y2 = args.y2 + int64_t{__ldg(args.position + pair)} * args.hidden + column;
    const Piece<kCount> piece = *reinterpret_cast<const Piece<kCount>*>(y2);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += weight * static_cast<float>(piece.value[i]);
  }
  Piece<kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.value[i] = static_cast<Element>(sum[i]);
  *reinterpret_cast<Piece<kCount>*>(args.out + token * args.hidden + column) = result;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

bool MoeBase::serves(const MoeCase& c) { return c.model.hidden % kGemmVector == 0 && c.model.inner % kGemmVector == 0; }

MoeBase::MoeBase(const MoeProblem& problem) : problem_(problem) {
  for (int64_t call = 0; call < problem.layers(); ++call) gemms_.push_back(make_gemms(call));
}

MoeBase::Gemms MoeBase::make_gemms(int64_t call) const {
  const Experts& m = problem_.shape().model;
  const int64_t wide = m.slices() * m.inner;
  std::vector<GemmProblem> gate_up;
  std::vector<GemmProblem> down;
  int64_t first = 0;
  for (int64_t expert = 0; expert < m.experts; ++expert) {
    const int64_t rows = problem_.routing(call).expert_rows[static_cast<size_t>(expert)];
    if (rows == 0) continue;
    const auto at = [](char* matrix, int64_t elements) { return matrix + elements * kElementBytes; };
    gate_up.push_back({rows, wide, m.hidden, at(problem_.sorted_x(), first * m.hidden), m.hidden,
                       at(problem_.w13(), expert * wide * m.hidden), m.hidden, at(problem_.y1(), first * wide), wide});
    down.push_back({rows, m.hidden, m.inner, at(problem_.h(), first * m.inner), m.inner,
                    at(problem_.w2(), expert * m.hidden * m.inner), m.inner, at(problem_.y2(), first * m.hidden),
                    m.hidden});
    first += rows;
  }
  const GemmConfig config{GemmShapes::kLongK, GemmBlocks::kOneATile, 1, 0};
  return {make_grouped_gemm(gate_up, config, "--base cutlass, gate and up"),
          make_grouped_gemm(down, config, "--base cutlass, down")};
}

void MoeBase::gate_up(int64_t call, cudaStream_t stream) const {
  const MoeCase& c = problem_.shape();
  gather_kernel<<<static_cast<unsigned>(c.pairs()), kThreads, 0, stream>>>(
      reinterpret_cast<const uint4*>(problem_.x()), problem_.view(call).row_map, c.model.top_k,
      c.model.hidden / kVector, reinterpret_cast<uint4*>(problem_.sorted_x()));
  check(cudaGetLastError(), "the base's gathering of x");
  gemms(call).gate_up->run(stream);
}

void MoeBase::act(cudaStream_t stream) const {
  const MoeCase& c = problem_.shape();
  const ActArgs args{reinterpret_cast<const Element*>(problem_.y1()),
                     reinterpret_cast<Element*>(problem_.h()),
                     c.pairs(),
                     c.model.inner,
                     c.model.activation(),
                     c.model.gated,
                     c.model.interleaved};
  act_kernel<<<blocks_for(c.pairs() * c.model.inner / kVector), kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "the base's activation");
}

void MoeBase::down(int64_t call, cudaStream_t stream) const { gemms(call).down->run(stream); }

void MoeBase::reduce(int64_t call, cudaStream_t stream) const {
  constexpr int64_t kEnough = 16384;  // threads
  const MoeCase& c = problem_.shape();
  const RoutingView view = problem_.view(call);
  const int count = c.rows * c.model.hidden / kVector >= kEnough ? kVector : kFew;
  const unsigned parts = blocks_for((c.model.hidden + count - 1) / count);
  const SumArgs args{reinterpret_cast<const Element*>(problem_.y2()),
                     view.position,
                     view.topk_weights,
                     reinterpret_cast<Element*>(problem_.out()),
                     c.model.hidden,
                     c.model.top_k,
                     static_cast<int32_t>(parts)};
  const auto grid = static_cast<unsigned>(c.rows) * parts;
  if (count == kVector) {
    sum_kernel<kVector><<<grid, kThreads, 0, stream>>>(args);
  } else {
    sum_kernel<kFew><<<grid, kThreads, 0, stream>>>(args);
  }
  check(cudaGetLastError(), "the base's sum");
}

void MoeBase::forward(int64_t call, cudaStream_t stream) const {
  gate_up(call, stream);
  act(stream);
  down(call, stream);
  reduce(call, stream);
}

}  // namespace polylora::bench
