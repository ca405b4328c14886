#include "cublas.h"

#include <dlfcn.h>

#include <vector>

#include "stats.h"

namespace polylora::bench {
namespace {

constexpr int64_t kWorkspaceBytes = 32 << 20;  // what cuBLAS itself takes on Hopper

// values of cublas_api.h and library_types.h
constexpr int kOpNone = 0;        // CUBLAS_OP_N
constexpr int kOpTranspose = 1;   // CUBLAS_OP_T
constexpr int kHalf = 2;          // CUDA_R_16F
constexpr int kBFloat16 = 14;     // CUDA_R_16BF
constexpr int kCompute32F = 68;   // CUBLAS_COMPUTE_32F
constexpr int kGemmDefault = -1;  // CUBLAS_GEMM_DEFAULT

}  // namespace

template <typename Function>
Function Cublas::symbol(const char* name) const {
  void* address = dlsym(library_, name);
  if (address == nullptr) throw UsageError(file_ + " has no " + name);
  return reinterpret_cast<Function>(address);
}

void Cublas::check_status(int status, const char* what) const {
  if (status != 0) throw std::runtime_error(format("%s: cuBLAS status %d", what, status));
}

Cublas::Cublas(const std::string& file, cudaStream_t stream) : workspace_(kWorkspaceBytes, "cuBLAS workspace") {
  std::vector<std::string> candidates = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
  if (!file.empty()) candidates = {file};
  std::string reasons;
  for (const std::string& candidate : candidates) {
    library_ = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_) {
      file_ = candidate;
      break;
    }
    reasons += std::string("\n  ") + dlerror();
  }
  if (library_ == nullptr) {
    throw UsageError("--chain needs cuBLAS, and none could be loaded (--cublas FILE or LD_LIBRARY_PATH):" + reasons);
  }
  gemm_ex_ = symbol<GemmEx>("cublasGemmEx");
  check_status(symbol<int (*)(Handle*)>("cublasCreate_v2")(&handle_), "cublasCreate");
  check_status(symbol<int (*)(Handle, cudaStream_t)>("cublasSetStream_v2")(handle_, stream), "cublasSetStream");
  check_status(symbol<int (*)(Handle, void*, size_t)>("cublasSetWorkspace_v2")(handle_, workspace_.as<void>(),
                                                                               static_cast<size_t>(kWorkspaceBytes)),
               "cublasSetWorkspace");
}

Cublas::~Cublas() {
  if (handle_) {
    if (void* destroy = dlsym(library_, "cublasDestroy_v2")) reinterpret_cast<int (*)(Handle)>(destroy)(handle_);
  }
  // the library stays loaded: it may hold state of the CUDA context
}

void Cublas::gemm(DType dtype, const void* x, const void* w, void* y, int64_t rows, int64_t n, int64_t k) const {
  const int type = dtype == DType::kFloat16 ? kHalf : kBFloat16;
  const float one = 1;
  const float zero = 0;
  // row-major [rows, n] is column-major [n, rows]
  check_status(gemm_ex_(handle_, kOpTranspose, kOpNone, static_cast<int>(n), static_cast<int>(rows),
                        static_cast<int>(k), &one, w, type, static_cast<int>(k), x, type, static_cast<int>(k), &zero, y,
                        type, static_cast<int>(n), kCompute32F, kGemmDefault),
               "cublasGemmEx");
}

}  // namespace polylora::bench
