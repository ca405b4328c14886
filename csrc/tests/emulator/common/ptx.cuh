// The kernels' PTX wrappers on the CPU: same names, same meaning. See ../emulator.h.
#pragma once

#include "../emulator.h"

#define POLYLORA_HAS_CLUSTERS 1
#define POLYLORA_HAS_WGMMA 1

namespace polylora::cuda::ptx {

namespace emu = polylora::emulator;

inline float to_float_of(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float to_float_of(__half v) { return __half2float(v); }

template <typename T>
inline float half_of(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
  return to_float_of(reinterpret_cast<const T&>(bits));
}

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operand {
    uint32_t a[4], b[2];
    float d[4];
  };
  struct Result {
    float d[4];
  };
  Operand mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const Result result = emu::warp_wide<Result>(mine, [](const Operand* const* in, Result* const* out) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        left[g][2 * t + half] = half_of<T>(in[lane]->a[0], half);
        left[g + 8][2 * t + half] = half_of<T>(in[lane]->a[1], half);
        left[g][2 * t + 8 + half] = half_of<T>(in[lane]->a[2], half);
        left[g + 8][2 * t + 8 + half] = half_of<T>(in[lane]->a[3], half);
        right[2 * t + half][g] = half_of<T>(in[lane]->b[0], half);
        right[2 * t + 8 + half][g] = half_of<T>(in[lane]->b[1], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const int m = g + 8 * (i / 2), n = 2 * t + i % 2;
        double sum = in[lane]->d[i];
        for (int k = 0; k < 16; ++k) sum += double{left[m][k]} * right[k][n];
        out[lane]->d[i] = static_cast<float>(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = result.d[i];
}

inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }

inline void load_matrices(uint32_t (&m)[4], const void* smem_row) {
  struct Result {
    uint32_t m[4];
  };
  const Result result = emu::warp_wide<Result>(smem_row, [](const void* const* const* in, Result* const* out) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const char* row = static_cast<const char*>(*in[8 * i + lane / 4]);
        std::memcpy(&out[lane]->m[i], row + 4 * (lane % 4), 4);
      }
    }
  });
  for (int i = 0; i < 4; ++i) m[i] = result.m[i];
}

template <typename V>
inline V load(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) std::abort();
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
inline uint4 load_weights16(const void* p) { return load<uint4>(p); }
inline uint4 load16(const void* p) { return load<uint4>(p); }
inline uint4 load_once16(const void* p) { return load<uint4>(p); }
inline uint2 load8(const void* p) { return load<uint2>(p); }
template <typename T>
T* keep(T* p) {
  return p;
}
inline uint32_t load4(const void* p) { return load<uint32_t>(p); }
inline uint2 load_weights8_if(bool condition, const void* p) { return condition ? load<uint2>(p) : uint2{0, 0}; }
inline int4 load_fresh16(const void* p) {
  emu::previous_grid_may_write();
  return load<int4>(p);
}
inline int load_fresh4(const void* p) {
  emu::previous_grid_may_write();
  return load<int>(p);
}
inline void store16(void* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) std::abort();
  std::memcpy(p, &v, 16);
}
inline void prefetch_bulk(const void* gmem, uint32_t bytes) {
  // touches the last byte: a prefetch must stay inside what the call was given, too
  if (reinterpret_cast<uintptr_t>(gmem) % 16 != 0 || bytes % 16 != 0 || bytes == 0) std::abort();
  volatile unsigned char touched = static_cast<const unsigned char*>(gmem)[bytes - 1];
  (void)touched;
}

inline void copy_async16(void* smem, const void* gmem, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(smem) % 16 != 0 || bytes > 16) std::abort();
  if (bytes > 0 && reinterpret_cast<uintptr_t>(gmem) % 16 != 0) std::abort();
  auto copy = std::make_shared<emu::Copy>();
  copy->run = [=] {
    std::memset(smem, 0, 16);
    if (bytes > 0) std::memcpy(smem, gmem, bytes);
  };
  emu::self().open_copies.push_back(copy);
  emu::self().block->cluster->in_flight.push_back(copy);
}
inline void commit_copies() {
  emu::self().copy_groups.push_back(std::move(emu::self().open_copies));
  emu::self().open_copies.clear();
}
template <int kOpen>
inline void wait_copies() {
  auto& groups = emu::self().copy_groups;
  while (groups.size() > kOpen) {
    for (auto& copy : groups.front()) {
      if (!copy->done) copy->run();
      copy->done = true;
    }
    groups.pop_front();
  }
}

inline int thread_again() { return static_cast<int>(emu::self().thread.x); }
inline unsigned char* dynamic_smem() { return emu::self().block->smem; }

inline void wait_for_previous_grid() { emu::previous_grid_ended(); }
inline void launch_next_grid() { emu::next_grid_may_start(); }

// ---- clusters: a shared::cluster address is (rank << 20) + offset
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emu::self().block->rank); }
inline uint32_t cluster_size() { return static_cast<uint32_t>(emu::self().block->cluster->blocks.size()); }
inline void cluster_arrive() { emu::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emu::cluster_arrive(); }
inline void cluster_wait() { emu::cluster_wait(); }
inline uint32_t map_to_rank(const void* smem, uint32_t rank) {
  return rank << 20 | static_cast<uint32_t>(static_cast<const unsigned char*>(smem) - emu::self().block->smem);
}
inline unsigned char* at_rank(uint32_t address, int bytes) {
  emu::Cluster& cluster = *emu::self().block->cluster;
  emu::Block& block = cluster.blocks.at(address >> 20);
  if (block.alive == 0 || (address & 0xfffff) + bytes > block.smem_bytes || address % bytes != 0) std::abort();
  return block.smem + (address & 0xfffff);
}
inline void init_barrier(uint64_t* barrier) { emu::barrier_at(barrier) = {1, 1, 0, 0}; }
inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  emu::Barrier& b = emu::barrier_at(barrier);
  if (b.expected == 0) std::abort();
  b.bytes += bytes;
  --b.pending;
  emu::complete(b);
}
inline void wait_barrier_cluster(uint64_t* barrier, uint32_t parity) {
  emu::Barrier& b = emu::barrier_at(barrier);
  while ((b.phase & 1) == parity) emu::wait_until_changed(b.phase, b.phase);
}
template <typename V>
inline void store_async(uint32_t address, V v, uint32_t barrier) {
  unsigned char* to = at_rank(address, sizeof(V));
  emu::Barrier& b = emu::barrier_at(at_rank(barrier, 8));
  if (b.expected == 0) std::abort();  // not initialised yet: its block may not even run
  emu::start_copy([=, &b] {
    std::memcpy(to, &v, sizeof(V));
    b.bytes -= static_cast<int64_t>(sizeof(V));
    emu::complete(b);
  });
}

// ---- wgmma: a warpgroup's products are computed when it waits for them, so that operands overwritten too early show
inline void fence_async_proxy() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  emu::self().wgmma_groups.push_back(std::move(emu::self().open_wgmma)), emu::self().open_wgmma.clear();
}
template <int kOpen>
inline void wgmma_wait() {
  auto& groups = emu::self().wgmma_groups;
  while (groups.size() > kOpen) {
    for (auto& product : groups.front()) product();
    groups.pop_front();
  }
}
inline uint64_t swizzled_rows(const void* smem) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(smem) - emu::self().block->smem;
  if (offset % 1024 != 0) std::abort();
  return static_cast<uint64_t>(offset) >> 4;
}
inline uint64_t further(uint64_t descriptor, int pieces) { return descriptor + static_cast<uint64_t>(pieces); }
// Element k of row `row` of what a descriptor describes, for a step that begins inside a swizzled row.
template <typename T>
inline float swizzled_element(uint64_t descriptor, int row, int k) {
  uintptr_t at = reinterpret_cast<uintptr_t>(emu::self().block->smem) + (descriptor << 4);
  at += static_cast<uintptr_t>(row * 128 + k * 2);
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const void*>(at), 2);
  return to_float_of(reinterpret_cast<const T&>(bits));
}
template <typename T, int kTiles>
inline void wgmma(float (*d)[8], uint64_t x, uint64_t weights) {
  const int warp = static_cast<int>(emu::self().thread.x) / 32 % 4;
  const int lane = emu::self().lane;
  // each thread computes its own part: no barrier among the warpgroup is needed, and none is made
  emu::self().open_wgmma.push_back([=] {
    for (int i = 0; i < kTiles * 8; ++i) {
      const int n = i / 8 * 16 + i % 8 / 4 * 8 + lane % 4 * 2 + i % 2;
      const int m = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      double sum = d[i / 8][i % 8];
      for (int k = 0; k < 16; ++k) sum += double{swizzled_element<T>(x, m, k)} * swizzled_element<T>(weights, n, k);
      d[i / 8][i % 8] = static_cast<float>(sum);
    }
  });
}
template <typename T>
inline void wgmma_m64n16k16(float (*d)[8], uint64_t x, uint64_t weights, T) {
  wgmma<T, 1>(d, x, weights);
}
template <typename T>
inline void wgmma_m64n32k16(float (*d)[8], uint64_t x, uint64_t weights, T) {
  wgmma<T, 2>(d, x, weights);
}
template <typename T>
inline void wgmma_m64n64k16(float (*d)[8], uint64_t x, uint64_t weights, T) {
  wgmma<T, 4>(d, x, weights);
}
template <typename T>
inline void wgmma_m64n96k16(float (*d)[8], uint64_t x, uint64_t weights, T) {
  wgmma<T, 6>(d, x, weights);
}
template <typename T>
inline void wgmma_m64n128k16(float (*d)[8], uint64_t x, uint64_t weights, T) {
  wgmma<T, 8>(d, x, weights);
}
template <int kPieces>
inline void use_after_wait(float (&)[kPieces][4][4]) {}
// x from registers: those of the quad that has this lane's rows.
template <typename T, int kTiles>
inline void wgmma(float (*d)[8], const uint32_t (&a)[4], uint64_t weights) {
  struct Operand {
    uint32_t a[4];
  };
  struct Rows {
    float x[2][16];
  };
  const Rows rows =
      emu::warp_wide<Rows>(Operand{{a[0], a[1], a[2], a[3]}}, [](const Operand* const* in, Rows* const* out) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int t = 0; t < 4; ++t) {
            for (int i = 0; i < 8; ++i) {  // row g or g + 8, the first or second 8 columns, element
              out[lane]->x[i / 2 % 2][i / 4 * 8 + 2 * t + i % 2] = half_of<T>(in[lane / 4 * 4 + t]->a[i / 2], i % 2);
            }
          }
        }
      });
  const int lane = emu::self().lane;
  emu::self().open_wgmma.push_back([=] {
    for (int i = 0; i < 8 * kTiles; ++i) {
      const int n = i / 8 * 16 + i % 8 / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = d[i / 8][i % 8];
      for (int k = 0; k < 16; ++k) sum += double{rows.x[i % 4 / 2][k]} * swizzled_element<T>(weights, n, k);
      d[i / 8][i % 8] = static_cast<float>(sum);
    }
  });
}
template <typename T>
inline void wgmma_m64n32k16(float (*d)[8], const uint32_t (&a)[4], uint64_t weights, T) {
  wgmma<T, 2>(d, a, weights);
}
template <typename T>
inline void wgmma_m64n64k16(float (*d)[8], const uint32_t (&a)[4], uint64_t weights, T) {
  wgmma<T, 4>(d, a, weights);
}

}  // namespace polylora::cuda::ptx
