// Which code of the library a device runs.
#include "common/launch.cuh"

namespace polylora::cuda {
namespace {

__global__ void probe() {}

}  // namespace

cudaError_t compiled_major(int& major) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  // of the PTX that the code was made from, also where the driver compiled it for a newer device
  major = error == cudaSuccess ? attributes.ptxVersion / 10 : 0;
  return error;
}

}  // namespace polylora::cuda
