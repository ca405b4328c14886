// Runs CUDA kernels on the CPU, thread by thread, so that a machine without a GPU tests the very code of the kernels.
//
// Every CUDA thread is a fiber. A fiber runs until it must wait: for a barrier, for the other lanes of a warp-wide
// instruction, for a copy. The next one is then drawn at random, so that code that forgot to wait sees what it should
// not. Copies that the hardware makes on its own (cp.async, cp.async.bulk, st.async) happen at a random time between
// their start and the wait for them. Shared memory starts as NaN. Blocks of a cluster run together, clusters one after
// the other in random order. What a grid must not rely on before griddepcontrol.wait can be made wrong until then.
//
// common/ptx.cuh and common/launch.cuh beside this file stand in for those of the kernels, which are compiled as C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace polylora::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/// An mbarrier. The 8 bytes in shared memory that stand for it are only its name.
struct Barrier {
  int64_t expected = 0;  // arrivals a phase
  int64_t pending = 0;   // arrivals still to come in this phase
  int64_t bytes = 0;     // expected minus arrived bytes of this phase
  uint32_t phase = 0;    // completed phases
};

struct Block;
struct Cluster;

/// The lanes of a warp, at a warp-wide instruction.
struct Warp {
  void* in[32] = {};
  void* out[32] = {};
  int arrived = 0;
  uint32_t generation = 0;
};

struct Copy {
  std::function<void()> run;
  bool done = false;
};

struct Thread {
  Index thread, block_index, grid, block_threads;
  int lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  void* stack_pointer = nullptr;
  uint32_t cluster_generation = 0;  // of the last arrive
  bool done = false, has_waited = false;
  std::vector<std::shared_ptr<Copy>> open_copies;              // cp.async not committed yet
  std::deque<std::vector<std::shared_ptr<Copy>>> copy_groups;  // cp.async groups, oldest first
  std::vector<std::function<void()>> open_wgmma;
  std::deque<std::vector<std::function<void()>>> wgmma_groups;
};

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;
  unsigned char* smem = nullptr;
  int64_t smem_bytes = 0;
  int alive = 0;
  int arrived = 0;
  uint32_t generation = 0;
  int or_value = 0, or_result = 0;
  bool has_waited = false;
  std::vector<Warp> warps;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  int alive = 0;
  int arrived = 0;
  uint32_t generation = 0;
  std::unordered_map<const void*, Barrier> barriers;
  std::vector<std::shared_ptr<Copy>> in_flight;  // bulk copies and asynchronous stores
};

struct Launch {
  dim3 grid;
  int threads = 0;
  int64_t smem_bytes = 0;
  int cluster = 1;
};

/// What a test sets before it calls a launcher.
struct Options {
  uint64_t seed = 1;
  // what the grid before writes; runs at the first griddepcontrol.wait, or once all threads of the first cluster wait,
  // and now and then at a load of what may be read before that: between two of them
  std::function<void()> previous_grid;
  std::function<void()> grid_begins;  // runs before the first block of every grid
};
Options& options();

/// What some thread of a grid did before it had waited for the grid before, or without ever waiting. Grids run one
/// after the other here; on a device these two decide which may run side by side.
struct GridOrder {
  bool starts_next_before_wait = false, ends_before_wait = false;
};
/// Of the grids since a test last cleared it.
std::vector<GridOrder>& grids();

/// The CUDA thread that runs now.
Thread& self();

/// Runs a grid. Ends the process with a message where all threads wait for something that never comes.
void run(const Launch& launch, const std::function<void()>& kernel);

/// Lets others run until `counter` differs from `value`.
void wait_until_changed(const uint32_t& counter, uint32_t value);

/// Adds 1 to `counter` and lets those who wait for it run.
void advance(uint32_t& counter);

void previous_grid_ended();
void next_grid_may_start();
void previous_grid_may_write();
void sync_threads();
int sync_threads_or(int value);
void cluster_arrive();
void cluster_wait();

Barrier& barrier_at(const void* smem);
void complete(Barrier& barrier);

/// Starts a copy that happens at some time from now on.
void start_copy(std::function<void()> copy);

/// Bytes that fault when touched past their end: every array of a test should live in one.
class GuardedBytes {
 public:
  explicit GuardedBytes(int64_t bytes, unsigned char fill = 0xff);
  ~GuardedBytes();
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  unsigned char* data() const { return data_; }
  int64_t size() const { return bytes_; }

 private:
  void* mapping_;
  size_t mapped_;
  unsigned char* data_;
  int64_t bytes_;
};

/// A warp-wide instruction: `compute(in, out)` sees the operands of all 32 lanes once all have come.
template <typename Out, typename In, typename Compute>
Out warp_wide(const In& in, const Compute& compute) {
  Warp& warp = *self().warp;
  In operand = in;
  Out result{};
  const int lane = self().lane;
  warp.in[lane] = &operand;
  warp.out[lane] = &result;
  const uint32_t generation = warp.generation;
  if (++warp.arrived == 32) {
    const In* all_in[32];
    Out* all_out[32];
    for (int i = 0; i < 32; ++i) {
      all_in[i] = static_cast<const In*>(warp.in[i]);
      all_out[i] = static_cast<Out*>(warp.out[i]);
    }
    compute(all_in, all_out);
    warp.arrived = 0;
    advance(warp.generation);
  } else {
    wait_until_changed(warp.generation, generation);
  }
  return result;
}

}  // namespace polylora::emulator

// ---- what the CUDA compiler gives to kernels
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define threadIdx (::polylora::emulator::self().thread)
#define blockIdx (::polylora::emulator::self().block_index)
#define gridDim (::polylora::emulator::self().grid)
#define blockDim (::polylora::emulator::self().block_threads)

inline void __syncthreads() { polylora::emulator::sync_threads(); }
inline int __syncthreads_or(int value) { return polylora::emulator::sync_threads_or(value); }
inline void __syncwarp() {
  polylora::emulator::warp_wide<int>(0, [](const int* const*, int* const*) {});
}
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return polylora::emulator::warp_wide<T>(value, [mask](const T* const* in, T* const* out) {
    for (int i = 0; i < 32; ++i) *out[i] = *in[i ^ mask];
  });
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int from) {
  struct Operand {
    T value;
    int from;
  };
  return polylora::emulator::warp_wide<T>(Operand{value, from}, [](const Operand* const* in, T* const* out) {
    for (int i = 0; i < 32; ++i) *out[i] = in[in[i]->from & 31]->value;
  });
}
template <typename T>
inline T __shfl_up_sync(unsigned, T value, int distance) {
  return polylora::emulator::warp_wide<T>(value, [distance](const T* const* in, T* const* out) {
    for (int i = 0; i < 32; ++i) *out[i] = *in[i < distance ? i : i - distance];
  });
}
template <typename T>
inline unsigned __match_any_sync(unsigned, T value) {
  return polylora::emulator::warp_wide<unsigned>(value, [](const T* const* in, unsigned* const* out) {
    for (int i = 0; i < 32; ++i) {
      *out[i] = 0;
      for (int j = 0; j < 32; ++j) *out[i] |= unsigned{*in[i] == *in[j]} << j;
    }
  });
}
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline bool __any_sync(unsigned, bool value) {
  return polylora::emulator::warp_wide<int>(value, [](const bool* const* in, int* const* out) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= *in[i];
    for (int i = 0; i < 32; ++i) *out[i] = any;
  });
}
inline float __int_as_float(int v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline void __trap() { std::abort(); }

// ---- what the plan's kernels need beside: votes, reductions over a warp, atomics (fibers switch at none of them)
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __ballot_sync(unsigned, bool value) {
  return polylora::emulator::warp_wide<unsigned>(value, [](const bool* const* in, unsigned* const* out) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned{*in[i]} << i;
    for (int i = 0; i < 32; ++i) *out[i] = votes;
  });
}
inline int __reduce_max_sync(unsigned, int value) {
  return polylora::emulator::warp_wide<int>(value, [](const int* const* in, int* const* out) {
    int most = *in[0];
    for (int i = 1; i < 32; ++i) most = max(most, *in[i]);
    for (int i = 0; i < 32; ++i) *out[i] = most;
  });
}
inline int __reduce_add_sync(unsigned, int value) {
  return polylora::emulator::warp_wide<int>(value, [](const int* const* in, int* const* out) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += *in[i];
    for (int i = 0; i < 32; ++i) *out[i] = sum;
  });
}
template <typename T>
inline T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
template <typename T>
inline T atomicMax(T* to, T value) {
  const T before = *to;
  *to = max(before, value);
  return before;
}
