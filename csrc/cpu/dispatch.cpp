// Picks the kernel set of the machine the process runs on.
#include "kernels.h"

#include <initializer_list>

namespace polylora::cpu {
namespace {

using KernelSet = const Kernels* (*)(DType);

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:  // and F16C, older than AVX2; not every compiler knows its name here
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return machine_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kGeneric;
#endif
}

KernelSet kernel_set(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return kernels_avx512;
    case Isa::kAvx2:
      return kernels_avx2;
    default:
      return kernels_generic;
  }
}

KernelSet best_kernel_set() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (machine_has(isa)) return kernel_set(isa);
  }
  return kernels_generic;
}

KernelSet& selected() {
  static KernelSet set = best_kernel_set();
  return set;
}

}  // namespace

const Kernels& kernels(DType dtype) { return *selected()(dtype); }

bool select_isa(Isa isa) {
  if (!machine_has(isa)) return false;
  selected() = kernel_set(isa);
  return true;
}

}  // namespace polylora::cpu
