// A step of an engine without torch: plan, then a fused linear of two slices; on the GPU where there is one.
#include <cstdio>

#include "polylora/cpu.h"
#ifdef POLYLORA_WITH_CUDA
#include "polylora/cuda.h"
int devices = 0;
const bool gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
#else
const bool gpu = false;
#endif
using namespace polylora;
constexpr int32_t kRows = 6, kK = 64, kSlots = 4, kRank = 8, kWidth = 32, kOut = 2 * kWidth;
constexpr int32_t kA = kSlots * 2 * kRank, kB = kSlots * kOut * kRank;

template <typename T>
T* zeros(int64_t n) {
#ifdef POLYLORA_WITH_CUDA
  void* p = nullptr;  // managed memory, so that this page needs no copies
  if (gpu) return cudaMallocManaged(&p, n * sizeof(T) + 1) || cudaMemset(p, 0, n * sizeof(T)) ? nullptr : (T*)p;
#endif
  return new T[n]();
}

int main() {
  // start: arenas of A rows and B elements, a table [slots, slices] in which all is absent, a step's buffers, the call
  float *a = zeros<float>(kA * kK), *b = zeros<float>(kB), *x = zeros<float>(kRows * kK),
        *y = zeros<float>(kRows * kOut);
  SliceEntry* table = zeros<SliceEntry>(kSlots * 2);
  int32_t *plan = zeros<int32_t>(plan_layout(kRows, kSlots, 0).words), *slot_of_row = zeros<int32_t>(kRows);
  LoraParams p{};
  p.dtype = DType::kFloat32, p.rows = kRows, p.plan = plan_view(plan, kRows, kSlots, 0);
  p.x = x, p.y = y, p.k = p.x_stride = kK, p.y_stride = kOut, p.v_width = 2 * kRank;
  p.slices = {table, kSlots, 2, {a, a}, {kK, kK}, {kA, kA}, {b, b}, {kB, kB}, {kWidth, kWidth}, {0, kWidth}, 1};
  // load: the weights, then their entry. Slot 1 has rank 8 in both slices, slot 3 rank 5 in the second alone
  const auto load = [&](int32_t slot, int32_t slice, int32_t rank, float scale) {
    const int32_t at = slot * 2 + slice;
    for (int32_t i = 0; i < rank * kK; ++i) a[at * kRank * kK + i] = 1.f / kK;
    for (int32_t i = 0; i < kWidth * kRank; ++i) b[at * kWidth * kRank + i] = at;
    table[at] = {at * kRank, rank, slice * kRank, kRank, at * kWidth * kRank, scale, 0};
  };
  load(1, 0, 8, 2.f), load(1, 1, 8, 2.f), load(3, 1, 5, 0.5f);
  // step: slots and x arrive (-1: no adapter; so is 4, out of range; 0 and 2 are empty), the plan once, then all layers
  for (int32_t i = 0; i < kRows * kK; ++i) x[i] = 1.f + i / kK, slot_of_row[i / kK] = i / kK - 1;
  const PlanParams step{plan, slot_of_row, false, kRows, kSlots};
  p.v = zeros<float>(kRows * p.v_width), p.v_stride = p.v_width;
#ifdef POLYLORA_WITH_CUDA
  int64_t bytes = 0;  // of scratch, in which this launcher keeps v
  if (gpu && (cuda::linear_scratch(p, bytes) || !(p.scratch = zeros<char>(bytes)))) return 1;
  if (gpu && (cuda::plan(step, nullptr) || cuda::linear(p, nullptr) || cudaDeviceSynchronize())) return 1;
#endif
  const auto serial = [](int64_t n, int64_t, const auto& body) { n > 0 ? body(0, n) : void(); };  // your thread pool
  if (!gpu) cpu::plan(step, serial), cpu::shrink(p, serial), cpu::expand(p, serial);
  for (int32_t i = 0; i < kRows * kOut; ++i) {
    const int32_t slot = slot_of_row[i / kOut], at = slot * 2 + i / kWidth % 2;
    const float want = slot == 1 || slot == 3 ? table[at].scale * table[at].rank * (i / kOut + 1) * at : 0;
    if (y[i] != want) return std::printf("y[%d] is %g, not %g\n", i, y[i], want), 1;
  }
  return std::printf("%s: every row is right\n", gpu ? "cuda" : "cpu"), 0;
}
