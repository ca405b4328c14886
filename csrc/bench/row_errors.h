// Errors of a matrix by rows, and what follows from them for groups of rows. No CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "stats.h"
#include "verdict.h"

namespace polylora::bench {

/// A row of a result against its reference.
struct RowError {
  double difference;     // squares
  double reference;      // squares
  int64_t not_finite;    // values
  int64_t worst_column;  // where the difference is largest
  double got, want;      // there
};

/// Rows of one key are judged together: ||difference|| / ||reference||. `place` says where a row stands.
inline Verdict judge(const char* op, const std::vector<RowError>& rows, const std::vector<int64_t>& keys,
                     const std::function<std::string(size_t row)>& place) {
  struct Sums {
    double difference = 0;
    double reference = 0;
    int64_t not_finite = 0;
    double error() const { return difference == 0 ? 0 : std::sqrt(difference / reference); }
    bool is_right() const { return not_finite == 0 && error() <= kMaxError; }
  };
  std::unordered_map<int64_t, Sums> sums;
  for (size_t row = 0; row < rows.size(); ++row) {
    Sums& of_key = sums[keys[row]];
    of_key.difference += rows[row].difference;
    of_key.reference += rows[row].reference;
    of_key.not_finite += rows[row].not_finite;
  }
  Verdict verdict;
  for (size_t row = 0; row < rows.size(); ++row) {
    const Sums& of_key = sums[keys[row]];
    verdict.error = std::max(verdict.error, of_key.error());
    if (of_key.is_right() || !verdict.failure.empty()) continue;
    verdict.failure =
        format("%s: error %.3g above %.3g, %lld values not finite; first at %s, column %lld: got %.6g, want %.6g", op,
               of_key.error(), kMaxError, static_cast<long long>(of_key.not_finite), place(row).c_str(),
               static_cast<long long>(rows[row].worst_column), rows[row].got, rows[row].want);
  }
  return verdict;
}

}  // namespace polylora::bench
