// Time of a call: a CUDA graph of many calls, replayed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "device.h"

namespace polylora::bench {

/// Enqueues call number `call`.
using Call = std::function<void(int64_t call, cudaStream_t stream)>;

/// A captured graph of `calls` calls, ready to replay.
class Graph {
 public:
  Graph(const Call& call, int64_t calls, cudaStream_t stream);
  Graph(Graph&& other) noexcept : exec_(std::exchange(other.exec_, nullptr)), calls_(other.calls_) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(exec_, other.exec_);
    std::swap(calls_, other.calls_);
    return *this;
  }
  ~Graph();

  void replay(cudaStream_t stream) const;
  int64_t calls() const { return calls_; }

 private:
  cudaGraphExec_t exec_ = nullptr;
  int64_t calls_ = 0;
};

struct TimingOptions {
  int reps = 15;      // replays at least
  double min_ms = 0;  // measured in all at least
};

/// us a call.
struct Timing {
  double median = 0;
  double min = 0;
  double max = 0;
  int64_t calls = 0;    // of a graph
  int64_t replays = 0;  //
};

/// Every graph holds a multiple of `period` calls, after which the weights come round again: however short a case is,
/// no weight is met twice before all others were.
Timing time_calls(const Call& call, int64_t period, const TimingOptions& options, cudaStream_t stream);

/// us a replay of each graph, taken in turn: first, second, first, ...
struct PairedTiming {
  std::vector<double> first;   // [replays]
  std::vector<double> second;  // [replays]
};
PairedTiming time_in_turn(const Graph& first, const Graph& second, const TimingOptions& options, cudaStream_t stream);

}  // namespace polylora::bench
