#include "guard.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

#include "stats.h"

namespace polylora::bench {
namespace {

constexpr const char* kPathVariable = "POLYLORA_PATH";

struct NoGpu : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace

int guarded_main(const std::string& program, const std::function<int()>& body) {
  const auto ended = [&](const std::exception& error, int code) {
    std::fprintf(stderr, "%s: %s\n", program.c_str(), error.what());
    return code;
  };
  try {
    return body();
  } catch (const UsageError& error) {
    return ended(error, kExitUsage);
  } catch (const NoGpu& error) {
    return ended(error, kExitNoGpu);
  } catch (const std::exception& error) {
    return ended(error, kExitFailed);
  }
}

Device device_or_throw() {
  Device device;
  std::string why_not;
  if (!find_device(&device, &why_not)) throw NoGpu("no GPU: " + why_not);
  return device;
}

Ending run_guarded(const std::string& path, const std::function<void()>& body) {
  try {
    body();
    return {};
  } catch (const CudaError& error) {
    cudaGetLastError();
    if (error.code == cudaErrorNotSupported) return {Ending::kNotServed, ""};
    if (error.code == cudaErrorMemoryAllocation) return {Ending::kTooLarge, ""};
    const bool forced = path != "auto" && error.code == cudaErrorInvalidValue;
    return {Ending::kFailed, std::string(error.what()) + (forced ? "; is there such a path?" : "")};
  }
}

void check_context() { check(cudaDeviceSynchronize(), "an error that no later case can be run after"); }

void set_path(const std::string& path) {
  if (path == "auto") {
    unsetenv(kPathVariable);
  } else {
    setenv(kPathVariable, path.c_str(), 1);
  }
}

std::vector<std::string> paths_or_default(const std::vector<std::string>& paths) {
  if (!paths.empty()) return paths;
  const char* set = std::getenv(kPathVariable);
  return {set && *set ? set : "auto"};
}

}  // namespace polylora::bench
