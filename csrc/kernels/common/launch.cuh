// Launching a kernel: shared memory above 48 KiB, clusters, programmatic dependent launch.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace polylora::cuda {

/// What the launchers ask of the current device.
struct Device {
  int index;
  int major;
  int sms;
};

inline cudaError_t current_device(Device& device) {
  constexpr int kMaxDevices = 64;
  static std::atomic<uint32_t> known[kMaxDevices];  // major << 16 | sms; 0: not asked yet
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index >= kMaxDevices) return cudaErrorInvalidDevice;
  uint32_t packed = known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0, sms = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index);
    if (error != cudaSuccess) return error;
    packed = static_cast<uint32_t>(major) << 16 | static_cast<uint32_t>(sms);
    known[index].store(packed, std::memory_order_relaxed);
  }
  device = {index, static_cast<int>(packed >> 16), static_cast<int>(packed & 0xffff)};
  return cudaSuccess;
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  int64_t smem_bytes = 0;
  int cluster = 1;       // blocks in x that run together; 9.0 and later
  bool overlap = false;  // may start before the kernel before has ended, and waits for it inside; 9.0 and later
};

/// Launches kKernel on `device`. kMaxSmem: the most shared memory any call of this kernel asks for.
template <auto kKernel, int kMaxSmem, typename Params>
cudaError_t launch(const Device& device, const LaunchShape& shape, const Params& params, cudaStream_t stream) {
  // attributes are set once for each kernel and device; a race sets the same ones twice
  static std::atomic<uint64_t> prepared{0};
  const uint64_t mine = uint64_t{1} << device.index;
  if ((prepared.load(std::memory_order_relaxed) & mine) == 0) {
    cudaError_t error = cudaSuccess;
    if (kMaxSmem > 48 * 1024)
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSmem);
    if (error == cudaSuccess && device.major >= 9) {
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error != cudaSuccess) return error;
    prepared.fetch_or(mine, std::memory_order_relaxed);
  }
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

}  // namespace polylora::cuda
