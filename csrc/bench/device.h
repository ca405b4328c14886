// Device memory, streams and errors of the benchmarks, and data to fill memory with.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "polylora/params.h"

namespace polylora::bench {

/// A CUDA call failed; the text names it.
struct CudaError : std::runtime_error {
  CudaError(cudaError_t error, const std::string& what);
  cudaError_t code;
};

/// Throws CudaError unless `error` is success.
void check(cudaError_t error, const std::string& what);

/// Properties of the device in use.
struct Device {
  std::string name;
  int sms = 0;
  int major = 0;
  int minor = 0;
  int64_t l2_bytes = 0;
  int runtime = 0;  // CUDA version of the runtime, 13000 = 13.0
  int driver = 0;   // the newest CUDA version that the driver knows
};

/// Device 0 (CUDA_VISIBLE_DEVICES chooses). False where there is none.
bool find_device(Device* device, std::string* why_not);

/// Bytes that can be allocated now.
int64_t free_bytes();

/// Device memory that frees itself.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(int64_t bytes, const std::string& what);
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer();

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  char* at(int64_t bytes) const { return static_cast<char*>(data_) + bytes; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(DeviceBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// Host to device, done when it returns: cudaMemcpy alone may only have staged it, and the benchmarks' stream does not
/// wait for the default one.
template <typename T>
void copy_to_device(void* to, const std::vector<T>& values, const std::string& what) {
  check(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), what);
  check(cudaStreamSynchronize(nullptr), what);
}

/// NaN in every element of 16 or 32 bits, -1 in every integer.
inline void poison(const DeviceBuffer& buffer, cudaStream_t stream) {
  if (buffer.bytes() == 0) return;
  check(cudaMemsetAsync(buffer.as<void>(), 0xff, static_cast<size_t>(buffer.bytes()), stream), "poisoning");
}

template <typename T>
DeviceBuffer upload(const std::vector<T>& values, const std::string& what) {
  DeviceBuffer buffer(static_cast<int64_t>(values.size() * sizeof(T)), what);
  copy_to_device(buffer.as<void>(), values, what);
  return buffer;
}

/// Device to host, done when it returns.
template <typename T>
std::vector<T> download(const void* from, int64_t count, const std::string& what) {
  std::vector<T> values(static_cast<size_t>(count));
  check(cudaMemcpy(values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost), what);
  return values;
}

class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();
  operator cudaStream_t() const { return stream_; }
  void synchronize(const std::string& what) const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// Independent uniform values of the given standard deviation; the same for the same seed.
void fill_random(void* data, int64_t elements, DType dtype, double deviation, uint64_t seed, cudaStream_t stream);

/// Random bits, none of the words zero.
void fill_random_bits(void* data, int64_t bytes, uint64_t seed, cudaStream_t stream);

}  // namespace polylora::bench
