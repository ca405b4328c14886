// bench_moe: the whole of main but its name.
#pragma once

namespace polylora::bench {

/// Returns the exit code.
int bench_moe_main(int argc, char** argv);

}  // namespace polylora::bench
