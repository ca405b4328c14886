// Which of an op's paths a call takes.
//
// POLYLORA_PATH forces one (an error where it does not serve the call; an op that has no such path takes the next in
// the list that it has). Read at every call.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/launch.cuh"

namespace polylora::cuda {

enum class Path { kCluster, kWide, kMma, kGeneral };
inline constexpr const char* kPathNames[] = {"cluster", "wide", "mma", "general"};

inline bool is_set(const char* text, const char* value) { return text && strcmp(text, value) == 0; }
inline bool is_forced(const char* path) { return is_set(getenv("POLYLORA_PATH"), path); }

/// Which paths serve a call, or an op has at all.
struct Served {
  bool path[4];
};

/// `first_choice`: the fastest one for the call.
inline cudaError_t choose(Served serves, Served has, Path& path, Path first_choice = Path::kCluster) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool able[] = {device.major >= 9, device.major == 9 && POLYLORA_COMPILED_90A, device.major >= 8, true};
  const char* name = getenv("POLYLORA_PATH");
  const bool forced = name != nullptr && *name != 0;
  int first = static_cast<int>(first_choice);
  if (forced) {
    for (first = 0; first < 4 && !is_set(name, kPathNames[first]);) ++first;
    if (first == 4) return cudaErrorInvalidValue;
    if (!has.path[first]) {
      while (!has.path[first] || !able[first]) ++first;
    }
  }
  for (int i = first; i < 4; ++i) {
    if (has.path[i] && serves.path[i] && able[i]) {
      path = static_cast<Path>(i);
      return cudaSuccess;
    }
    if (forced) break;
  }
  return cudaErrorNotSupported;
}

}  // namespace polylora::cuda
