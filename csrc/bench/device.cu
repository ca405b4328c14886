#include "device.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "hash.h"

namespace polylora::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

template <typename T>
__device__ T rounded(float value) {
  return static_cast<T>(value);
}

// A thread takes 8 elements at a time.
template <typename T>
__global__ void fill_random_kernel(T* data, int64_t n, float half_width, uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at * 8 < n; at += step) {
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const uint64_t bits = hash(seed, static_cast<uint64_t>(at * 8 + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float unit = (static_cast<float>((bits >> (16 * j)) & 0xffff) + 0.5f) * (1.0f / 32768.0f) - 1.0f;
        values[i + j] = rounded<T>(unit * half_width);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at * 8 + i < n) data[at * 8 + i] = values[i];
    }
  }
}

__global__ void fill_bits_kernel(uint32_t* data, int64_t n, uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    data[i] = static_cast<uint32_t>(hash(seed, static_cast<uint64_t>(i))) | 1u;
  }
}

}  // namespace

CudaError::CudaError(cudaError_t error, const std::string& what)
    : std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")"), code(error) {}

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw CudaError(error, what);
}

bool find_device(Device* device, std::string* why_not) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    *why_not = error == cudaSuccess ? "no device" : cudaGetErrorString(error);
    return false;
  }
  check(cudaSetDevice(0), "cudaSetDevice");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  device->name = properties.name;
  device->sms = properties.multiProcessorCount;
  device->major = properties.major;
  device->minor = properties.minor;
  device->l2_bytes = properties.l2CacheSize;
  check(cudaRuntimeGetVersion(&device->runtime), "cudaRuntimeGetVersion");
  check(cudaDriverGetVersion(&device->driver), "cudaDriverGetVersion");
  return true;
}

int64_t free_bytes() {
  size_t available = 0;
  size_t total = 0;
  check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(available);
}

DeviceBuffer::DeviceBuffer(int64_t bytes, const std::string& what) : bytes_(bytes) {
  // never of size 0, so that every buffer has an address
  check(cudaMalloc(&data_, static_cast<size_t>(bytes > 0 ? bytes : 16)),
        what + ": allocation of " + std::to_string(bytes) + " bytes");
}

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

Stream::Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }

Stream::~Stream() { cudaStreamDestroy(stream_); }

void Stream::synchronize(const std::string& what) const { check(cudaStreamSynchronize(stream_), what); }

void fill_random(void* data, int64_t elements, DType dtype, double deviation, uint64_t seed, cudaStream_t stream) {
  if (elements == 0) return;
  const auto half_width = static_cast<float>(deviation * std::sqrt(3.0));
  const unsigned blocks = blocks_for((elements + 7) / 8);
  switch (dtype) {
    case DType::kBFloat16:
      fill_random_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(data), elements, half_width,
                                                          seed);
      break;
    case DType::kFloat16:
      fill_random_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<__half*>(data), elements, half_width, seed);
      break;
    case DType::kFloat32:
      fill_random_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<float*>(data), elements, half_width, seed);
  }
  check(cudaGetLastError(), "fill_random");
}

void fill_random_bits(void* data, int64_t bytes, uint64_t seed, cudaStream_t stream) {
  fill_bits_kernel<<<blocks_for(bytes / 4), kThreads, 0, stream>>>(static_cast<uint32_t*>(data), bytes / 4, seed);
  check(cudaGetLastError(), "fill_random_bits");
}

}  // namespace polylora::bench
