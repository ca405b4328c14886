# CUTLASS's headers: CUTLASS_DIR (a checkout), or the Python package nvidia-cutlass of the build's Python.
# Sets Cutlass_FOUND and CUTLASS_INCLUDE_DIRS.
set(CUTLASS_DIR "" CACHE PATH "CUTLASS checkout, for the benchmarks' baseline (default: the package nvidia-cutlass)")
set(candidates ${CUTLASS_DIR})
if(NOT CUTLASS_DIR AND Python_EXECUTABLE)
  # found without importing it: the package wants others that a build does not need
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u, os
spec = u.find_spec('cutlass_library')
print(os.path.join(os.path.dirname(spec.origin), 'source') if spec and spec.origin else '')"
    OUTPUT_VARIABLE candidates OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(candidates AND EXISTS "${candidates}/include/cutlass/gemm/device/gemm_grouped.h")
  set(CUTLASS_INCLUDE_DIRS "${candidates}/include" "${candidates}/tools/util/include")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Cutlass DEFAULT_MSG CUTLASS_INCLUDE_DIRS)
unset(candidates)
