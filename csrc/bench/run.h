// bench_linear and bench_embedding: the whole of main but its name.
#pragma once

namespace polylora::bench {

/// `embedding`: bench_embedding, else bench_linear. Returns the exit code.
int bench_main(int argc, char** argv, bool embedding);

}  // namespace polylora::bench
