// The base layers of a chain: y = x W^T by cuBLAS, which is loaded when asked for. The executables do not need it else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "device.h"
#include "polylora/params.h"

namespace polylora::bench {

class Cublas {
 public:
  /// `file` empty: libcublas.so.13, .so.12, .so. Throws UsageError where none can be loaded.
  Cublas(const std::string& file, cudaStream_t stream);
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;
  ~Cublas();

  /// y [rows, n] = x [rows, k] W^T, W [n, k]; all contiguous, fp32 accumulation.
  void gemm(DType dtype, const void* x, const void* w, void* y, int64_t rows, int64_t n, int64_t k) const;

  const std::string& file() const { return file_; }

 private:
  template <typename Function>
  Function symbol(const char* name) const;
  void check_status(int status, const char* what) const;

  // cublas_api.h, as far as it is used; unchanged since CUDA 11
  using Handle = void*;
  using GemmEx = int (*)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                         const void*, void*, int, int, int, int);

  std::string file_;
  void* library_ = nullptr;
  Handle handle_ = nullptr;
  GemmEx gemm_ex_ = nullptr;
  DeviceBuffer workspace_;  // of our own, so that capture allocates nothing
};

}  // namespace polylora::bench
