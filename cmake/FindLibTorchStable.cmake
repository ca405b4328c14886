# Headers and libraries of the torch that the Python interpreter sees, for a library on the stable ABI.
# find_package(Torch) wants the whole CUDA toolkit of torch's own build; the stable ABI needs none of it.
if(NOT TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py
    OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "polylora: no torch >= 2.10 for ${Python_EXECUTABLE}; install torch first")
  endif()
endif()
add_library(LibTorchStable::LibTorchStable INTERFACE IMPORTED)
target_include_directories(LibTorchStable::LibTorchStable SYSTEM INTERFACE ${TORCH_DIR}/include)
# 2.10 is the oldest torch whose stable ABI has all that the ops use; the library then runs on it and all later ones
target_compile_definitions(LibTorchStable::LibTorchStable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_directories(LibTorchStable::LibTorchStable INTERFACE ${TORCH_DIR}/lib)
target_link_options(LibTorchStable::LibTorchStable INTERFACE -Wl,--no-as-needed)
target_link_libraries(LibTorchStable::LibTorchStable INTERFACE stdc++ torch torch_cpu c10)
set(LibTorchStable_FOUND TRUE)
