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

/// us a call of a base, and what a call with more in it takes beyond.
struct AddedTiming {
  double base = 0;  // median
  Timing added;     // of the differences (with - without), one a pair of replays
  double low = 0;   // their quartiles
  double high = 0;  //
};

/// Graphs of as many calls, replayed in turn: with, without, with, ...
AddedTiming time_added(const Graph& with, const Graph& without, const TimingOptions& options, cudaStream_t stream);

/// The same of calls: both are run once before, and graphs of them are long enough; `period` as in time_calls.
AddedTiming time_added(const Call& with, const Call& without, int64_t period, const TimingOptions& options,
                       cudaStream_t stream);

}  // namespace polylora::bench
