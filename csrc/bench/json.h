// Lines of text and JSON, as soon as they are known. No CUDA.
#pragma once

#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

#include "stats.h"

namespace polylora::bench {

inline void print(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

inline std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      result += format("\\u%04x", c);
    } else {
      result += c;
    }
  }
  return result + "\"";
}

inline const char* json_bool(bool value) { return value ? "true" : "false"; }

template <typename T>
inline std::string json_list(const std::vector<T>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    if constexpr (std::is_integral_v<T>) {
      text += format("%s%lld", i ? ", " : "", static_cast<long long>(values[i]));
    } else {
      text += format("%s%.5g", i ? ", " : "", static_cast<double>(values[i]));
    }
  }
  return text + "]";
}

}  // namespace polylora::bench
