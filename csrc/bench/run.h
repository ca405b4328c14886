// What the executables share: the whole of main but its name.
#pragma once

namespace polylora::bench {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitNoGpu = 3;

/// `embedding`: bench_embedding, else bench_linear. Returns the exit code.
int bench_main(int argc, char** argv, bool embedding);

}  // namespace polylora::bench
