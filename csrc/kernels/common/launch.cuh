// Launching a kernel: shared memory above 48 KiB, clusters, programmatic dependent launch.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace polylora::cuda {

inline constexpr int kMaxDevices = 64;
inline constexpr int kMaxCluster = 16;

/// Sets `major` to the compute capability, 8 for 8.x, whose code of this library the current device runs: that of the
/// device, or below, where only PTX for an older one was compiled. Such code has no clusters and no dependent launch.
cudaError_t compiled_major(int& major);

/// What the launchers ask of the current device.
struct Device {
  int index;
  int major;  // of the code that runs on it
  int sms;
  int smem_bytes;  // that a block can have: 99 KiB on 8.6, 8.9 and 12.0, 163 on 8.0, 227 on 9.0 and 10.0
};

inline cudaError_t current_device(Device& device) {
  static std::atomic<uint64_t> known[kMaxDevices];  // major, sms, shared memory in 16, 16, 32 bits; 0: not asked yet
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index >= kMaxDevices) return cudaErrorInvalidDevice;
  uint64_t packed = known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0, sms = 0, smem = 0;
    error = compiled_major(major);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    }
    if (error != cudaSuccess) return error;
    packed = static_cast<uint64_t>(major) << 48 | static_cast<uint64_t>(sms) << 32 | static_cast<uint32_t>(smem);
    known[index].store(packed, std::memory_order_relaxed);
  }
  device = {index, static_cast<int>(packed >> 48), static_cast<int>(packed >> 32 & 0xffff),
            static_cast<int>(packed & 0xffffffff)};
  return cudaSuccess;
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  int64_t smem_bytes = 0;
  int cluster = 1;       // blocks in x that run together; 9.0 and later
  bool overlap = false;  // may start before the kernel before has ended, and waits for it inside; 9.0 and later
};

/// What kKernel needs before its first launch on `device`: leave to take all shared memory, and clusters of any size.
template <auto kKernel>
cudaError_t prepare(const Device& device) {
  // once for each kernel and device; a race sets the same attributes twice
  static std::atomic<uint64_t> prepared{0};
  const uint64_t mine = uint64_t{1} << device.index;
  if ((prepared.load(std::memory_order_relaxed) & mine) == 0) {
    cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.smem_bytes);
    if (error == cudaSuccess && device.major >= 9) {
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error != cudaSuccess) return error;
    prepared.fetch_or(mine, std::memory_order_relaxed);
  }
  return cudaSuccess;
}

/// Launches kKernel on `device`.
template <auto kKernel, typename Params>
cudaError_t launch(const Device& device, const LaunchShape& shape, const Params& params, cudaStream_t stream) {
  const cudaError_t error = prepare<kKernel>(device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (device.major >= 9 && shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (device.major >= 9 && shape.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kKernel, params);
}

/// How many clusters of `blocks` blocks `device` runs at once, 0 where it knows none of that size; `threads` and
/// `smem_bytes` are the same in all calls.
template <auto kKernel>
cudaError_t resident_clusters(const Device& device, int threads, int smem_bytes, int blocks, int& clusters) {
  static std::atomic<uint8_t> known[kMaxDevices][kMaxCluster + 1];  // plus 1; 0: not asked yet
  std::atomic<uint8_t>& mine = known[device.index][blocks];
  clusters = mine.load(std::memory_order_relaxed) - 1;
  if (clusters >= 0) return cudaSuccess;
  cudaError_t error = prepare<kKernel>(device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config);
  if (error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration) {
    cudaGetLastError();  // an answer, not a failure
    clusters = 0;
    error = cudaSuccess;
  }
  if (error == cudaSuccess)
    mine.store(static_cast<uint8_t>(clusters < 254 ? clusters + 1 : 255), std::memory_order_relaxed);
  return error;
}

}  // namespace polylora::cuda
