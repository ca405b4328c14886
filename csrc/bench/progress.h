// What a run is doing, on stderr, with the seconds since it began: results alone go to stdout.
#pragma once

#include <chrono>
#include <cstdio>
#include <string>

namespace polylora::bench {

class Progress {
 public:
  void say(const std::string& text) const {
    const std::chrono::duration<double> since = std::chrono::steady_clock::now() - began_;
    std::fprintf(stderr, "[%6.1f s] %s\n", since.count(), text.c_str());
  }

 private:
  std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

}  // namespace polylora::bench
