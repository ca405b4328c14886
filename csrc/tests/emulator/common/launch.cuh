// Launching on the CPU. See ../emulator.h.
#pragma once

#include "../emulator.h"

namespace polylora::cuda {

struct Device {
  int index;
  int major;
  int sms;
  int smem_bytes;
};

/// The device that the launchers see; tests change it.
inline Device emulated_device{0, 9, 132, 227 * 1024};

inline cudaError_t current_device(Device& device) {
  device = emulated_device;
  return cudaSuccess;
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  int64_t smem_bytes = 0;
  int cluster = 1;
  bool overlap = false;
};

/// The launches since a test last cleared it.
inline std::vector<LaunchShape> launches;

template <auto kKernel, typename Params>
cudaError_t launch(const Device& device, const LaunchShape& shape, const Params& params, cudaStream_t) {
  if (shape.smem_bytes > device.smem_bytes || (shape.cluster > 1 && device.major < 9)) return cudaErrorInvalidValue;
  launches.push_back(shape);
  emulator::run({shape.grid, shape.threads, shape.smem_bytes, shape.cluster}, [&] { kKernel(params); });
  return cudaSuccess;
}

template <auto kKernel>
cudaError_t resident_clusters(const Device& device, int, int, int blocks, int& clusters) {
  clusters = device.sms / blocks;
  return cudaSuccess;
}

}  // namespace polylora::cuda
