// What a check found.
#pragma once

#include <string>

namespace polylora::bench {

/// ||result - reference|| / ||delta|| above which a result counts as wrong. One rounding of y to bf16 is 2.5e-3.
inline constexpr double kMaxError = 2e-2;

struct Verdict {
  double error = 0;
  std::string failure;  // empty: right
};

}  // namespace polylora::bench
