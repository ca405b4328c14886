// How runs end: exit codes, what one case cannot do, paths of the library in force.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "device.h"

namespace polylora::bench {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitNoGpu = 3;

/// Runs `body`, whose result is the exit code. What it throws is said on stderr and becomes the exit code.
int guarded_main(const std::string& program, const std::function<int()>& body);

/// The device, or what makes guarded_main return kExitNoGpu.
Device device_or_throw();

/// What became of a case.
struct Ending {
  enum How { kFine, kNotServed, kTooLarge, kFailed } how = kFine;
  std::string why;  // of kFailed
};

/// Runs `body` with `path`; a CudaError that it throws ends the case alone.
Ending run_guarded(const std::string& path, const std::function<void()>& body);

/// Throws where an error has stayed with the context: no case can run any more.
void check_context();

/// Sets POLYLORA_PATH; "auto" unsets it. The library reads it at every call; a replay runs what was captured.
void set_path(const std::string& path);

/// `paths`, or where there are none the environment's, or "auto".
std::vector<std::string> paths_or_default(const std::vector<std::string>& paths);

}  // namespace polylora::bench
