// PTX wrappers, one instruction each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define POLYLORA_HAS_CLUSTERS 1
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define POLYLORA_HAS_WGMMA 1
#endif

namespace polylora::cuda::ptx {

/// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}: d += a * b
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// ld.global.nc.L1::no_allocate.v2 under a predicate, else zeros
__device__ __forceinline__ uint2 load_weights8_if(bool condition, const void* p) {
  uint2 v;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];\n"
      "}"
      : "=&r"(v.x), "=&r"(v.y)
      : "l"(p), "r"(static_cast<uint32_t>(condition)));
  return v;
}

/// ld.relaxed.gpu.global.v4: from L2, whatever L1 remembers
__device__ __forceinline__ int4 load_fresh16(const void* p) {
  int4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

/// ld.relaxed.gpu.global: from L2, whatever L1 remembers. What all layers of a step read again is to stay there while
/// the base layers' weights stream past.
__device__ __forceinline__ int load_fresh4(const void* p) {
  int v;
  constexpr uint64_t kEvictLast = 0x14f0000000000000;  // as createpolicy.fractional.L2::evict_last makes it
  asm volatile("ld.relaxed.gpu.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(kEvictLast) : "memory");
  return v;
}

/// ld.global.nc.L1::no_allocate.v4: weights, read once
__device__ __forceinline__ uint4 load_weights16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// ld.global.v4
__device__ __forceinline__ uint4 load16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

/// ld.global.v4 of what nobody reads again soon: it makes room in L2 before others do
__device__ __forceinline__ uint4 load_once16(const void* p) {
  uint4 v;
  constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // as createpolicy.fractional.L2::evict_first makes it
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(kEvictFirst));
  return v;
}

/// ld.global.v2
__device__ __forceinline__ uint2 load8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

/// ld.global
__device__ __forceinline__ uint32_t load4(const void* p) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

/// st.global.v4
__device__ __forceinline__ void store16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

/// ex2.approx.ftz
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// rcp.approx.ftz
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane l gives the address of row l % 8 of matrix l / 8
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(smem_row)))
               : "memory");
}

/// cp.async.cg.shared.global, 16 bytes: the first `bytes` of them from memory, zeros behind
__device__ __forceinline__ void copy_async16(void* smem, const void* gmem, uint32_t bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(smem))),
      "l"(gmem), "r"(bytes)
      : "memory");
}

/// %tid.x, in a way that the compiler does not take for threadIdx.x
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/// The same pointer, in a register from here on: the compiler does not find it again from what it was made of.
template <typename T>
__device__ __forceinline__ T* keep(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

/// cp.async.commit_group
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// cp.async.wait_group: all but the youngest `kOpen` groups of this thread have landed
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

/// The block's dynamic shared memory, aligned as the swizzle of wgmma's operands wants it.
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char smem[];
  return smem;
}

/// griddepcontrol.wait: all grids before this one have ended and their writes are visible
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// griddepcontrol.launch_dependents: the next grid may start its blocks
__device__ __forceinline__ void launch_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// %cluster_ctarank
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

/// %cluster_nctarank
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}

/// barrier.cluster.arrive.release
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

/// barrier.cluster.arrive.relaxed: says that this block runs, or has read what it was sent; publishes no writes
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

/// barrier.cluster.wait.acquire
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/// mapa.shared::cluster: the address of `smem` in block `rank` of the cluster
__device__ __forceinline__ uint32_t map_to_rank(const void* smem, uint32_t rank) {
  uint32_t to;
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(from), "r"(rank));
  return to;
}

/// mbarrier.init.shared::cta, for one arrival, visible to the copy engine
__device__ __forceinline__ void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// mbarrier.arrive.expect_tx.shared::cta
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
               "r"(bytes)
               : "memory");
}

/// cp.async.bulk.prefetch.L2.global: address and size in multiples of 16 bytes
__device__ __forceinline__ void prefetch_bulk(const void* gmem, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(gmem), "r"(bytes) : "memory");
}

/// mbarrier.try_wait.parity.acquire.cluster.shared::cta, until it succeeds: also sees what other blocks stored
__device__ __forceinline__ void wait_barrier_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(parity)
      : "memory");
}

/// st.async.shared::cluster.v4: 16 bytes into another block's shared memory, counted by its mbarrier
__device__ __forceinline__ void store_async(uint32_t address, float4 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(uint32_t address, uint4 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}

/// st.async.shared::cluster.v2: 8 bytes
__device__ __forceinline__ void store_async(uint32_t address, uint2 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(address),
               "r"(v.x), "r"(v.y), "r"(barrier)
               : "memory");
}

/// fence.proxy.async.shared::cta: what this thread wrote to shared memory, the tensor cores and the copy engine see
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

#if defined(POLYLORA_HAS_WGMMA)
/// wgmma.fence.sync.aligned: registers of accumulators are ready for wgmma
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Behind wgmma_wait: nothing is done with these accumulators before it.
template <int kPieces>
__device__ __forceinline__ void use_after_wait(float (&acc)[kPieces][4][4]) {
#pragma unroll
  for (int i = 0; i < 16 * kPieces; ++i) asm volatile("" : "+f"(acc[i / 16][i / 4 % 4][i % 4]));
}

/// wgmma.commit_group.sync.aligned
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// wgmma.wait_group.sync.aligned: all but the youngest `kOpen` groups of this warpgroup are done
template <int kOpen>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// The upper word of these descriptors: 1024 bytes from 8 rows to the next, 128-byte swizzle.
inline constexpr uint32_t kSwizzledRows = 1024 >> 4 | 1u << 30;

/// Descriptor of rows of 64 16-bit elements, 128 bytes apart, 128-byte swizzle, from a multiple of 1024 bytes on. Plus
/// 2 for each 16 elements further along the rows.
__device__ __forceinline__ uint64_t swizzled_rows(const void* smem) {
  const uint64_t address = __cvta_generic_to_shared(smem);
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{kSwizzledRows} << 32;
}

/// Such a descriptor, `pieces` of 16 bytes further: its place is in the lower word, and the compiler knows the upper.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int pieces) {
  return uint64_t{kSwizzledRows} << 32 | (static_cast<uint32_t>(descriptor) + pieces);
}

// wgmma.mma_async.m64n{16 kTiles}k16.f32: d += x * weights^T. Rank tile i of 16: d[i][0..7]; lane 4g + t of warp w has
// of rows 16w + g and 16w + g + 8 columns 16i + 2t, 16i + 2t + 1 of both, then the same of the second 8 columns. x by a
// descriptor, or from registers, as those of mma_m16n8k16.
#define POLYLORA_TILE(i) \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i][4]), "+f"(d[i][5]), "+f"(d[i][6]), "+f"(d[i][7])
#define POLYLORA_WGMMA(n, type, registers, x_and_weights, ...)                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" registers "}, " x_and_weights \
               ", 1, 1, 1, 0, 0;"                                                                                   \
               : __VA_ARGS__                                                                                        \
               : "l"(x), "l"(weights))
#define POLYLORA_WGMMA_ROWS(n, type, registers, rows_and_weights, ...)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" registers "}, " rows_and_weights \
               ", 1, 1, 1, 0;"                                                                                         \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(weights))
#define POLYLORA_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define POLYLORA_REGISTERS_16 POLYLORA_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define POLYLORA_REGISTERS_32 \
  POLYLORA_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define POLYLORA_REGISTERS_48 \
  POLYLORA_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define POLYLORA_REGISTERS_64 \
  POLYLORA_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define POLYLORA_WGMMAS(T, type)                                                                                       \
  __device__ __forceinline__ void wgmma_m64n16k16(float (*d)[8], uint64_t x, uint64_t weights, T) {                    \
    POLYLORA_WGMMA(16, type, POLYLORA_REGISTERS_8, "%8, %9", POLYLORA_TILE(0));                                        \
  }                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n32k16(float (*d)[8], uint64_t x, uint64_t weights, T) {                    \
    POLYLORA_WGMMA(32, type, POLYLORA_REGISTERS_16, "%16, %17", POLYLORA_TILE(0), POLYLORA_TILE(1));                   \
  }                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n64k16(float (*d)[8], uint64_t x, uint64_t weights, T) {                    \
    POLYLORA_WGMMA(64, type, POLYLORA_REGISTERS_32, "%32, %33", POLYLORA_TILE(0), POLYLORA_TILE(1), POLYLORA_TILE(2),  \
                   POLYLORA_TILE(3));                                                                                  \
  }                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n96k16(float (*d)[8], uint64_t x, uint64_t weights, T) {                    \
    POLYLORA_WGMMA(96, type, POLYLORA_REGISTERS_48, "%48, %49", POLYLORA_TILE(0), POLYLORA_TILE(1), POLYLORA_TILE(2),  \
                   POLYLORA_TILE(3), POLYLORA_TILE(4), POLYLORA_TILE(5));                                              \
  }                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n128k16(float (*d)[8], uint64_t x, uint64_t weights, T) {                   \
    POLYLORA_WGMMA(128, type, POLYLORA_REGISTERS_64, "%64, %65", POLYLORA_TILE(0), POLYLORA_TILE(1), POLYLORA_TILE(2), \
                   POLYLORA_TILE(3), POLYLORA_TILE(4), POLYLORA_TILE(5), POLYLORA_TILE(6), POLYLORA_TILE(7));          \
  }                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n32k16(float (*d)[8], const uint32_t (&a)[4], uint64_t weights, T) {        \
    POLYLORA_WGMMA_ROWS(32, type, POLYLORA_REGISTERS_16, "{%16, %17, %18, %19}, %20", POLYLORA_TILE(0),                \
                        POLYLORA_TILE(1));                                                                             \
  }                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n64k16(float (*d)[8], const uint32_t (&a)[4], uint64_t weights, T) {        \
    POLYLORA_WGMMA_ROWS(64, type, POLYLORA_REGISTERS_32, "{%32, %33, %34, %35}, %36", POLYLORA_TILE(0),                \
                        POLYLORA_TILE(1), POLYLORA_TILE(2), POLYLORA_TILE(3));                                         \
  }
POLYLORA_WGMMAS(__nv_bfloat16, bf16)
POLYLORA_WGMMAS(__half, f16)
#undef POLYLORA_WGMMAS
#undef POLYLORA_REGISTERS_64
#undef POLYLORA_REGISTERS_48
#undef POLYLORA_REGISTERS_32
#undef POLYLORA_REGISTERS_16
#undef POLYLORA_REGISTERS_8
#undef POLYLORA_WGMMA_ROWS
#undef POLYLORA_WGMMA
#undef POLYLORA_TILE
#endif

}  // namespace polylora::cuda::ptx
