#include "timing.h"

#include <algorithm>
#include <cmath>

#include "stats.h"

namespace polylora::bench {
namespace {

constexpr double kMinGraphUs = 1000;  // a replay's own start, some 2 us, is lost in it
constexpr int64_t kMinCalls = 10;
constexpr int64_t kMaxCalls = 8192;
constexpr int kWarmups = 3;  // they also let the host run ahead, so that no replay waits for its launch
constexpr double kMaxReplays = 2000;

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  double us_since(const Event& start) const {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start.event_, event_), "cudaEventElapsedTime");
    return 1e3 * static_cast<double>(ms);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// us of each of `replays` turns through the graphs, [graphs][replays].
std::vector<std::vector<double>> time_replays(const std::vector<const Graph*>& graphs, int64_t replays,
                                              cudaStream_t stream) {
  const size_t stops = graphs.size() * static_cast<size_t>(replays);
  std::vector<Event> events(stops + 1);
  for (int i = 0; i < kWarmups; ++i) {
    for (const Graph* graph : graphs) graph->replay(stream);
  }
  events[0].record(stream);
  for (size_t i = 0; i < stops; ++i) {
    graphs[i % graphs.size()]->replay(stream);
    events[i + 1].record(stream);
  }
  check(cudaStreamSynchronize(stream), "replay of the graph");
  std::vector<std::vector<double>> us(graphs.size());
  for (size_t i = 0; i < stops; ++i) us[i % graphs.size()].push_back(events[i + 1].us_since(events[i]));
  return us;
}

int64_t replays_for(const TimingOptions& options, double us) {
  const double wanted = std::ceil(1e3 * options.min_ms / std::max(us, 1.0));
  return static_cast<int64_t>(std::max<double>(options.reps, std::min(wanted, kMaxReplays)));
}

}  // namespace

Graph::Graph(const Call& call, int64_t calls, cudaStream_t stream) : calls_(calls) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    for (int64_t i = 0; i < calls; ++i) call(i, stream);
  } catch (...) {  // leave the stream as it was
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
  check(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
}

Graph::~Graph() {
  if (exec_) cudaGraphExecDestroy(exec_);
}

void Graph::replay(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch"); }

Timing time_calls(const Call& call, int64_t period, const TimingOptions& options, cudaStream_t stream) {
  const auto whole_periods = [&](int64_t calls) { return (calls + period - 1) / period * period; };
  call(0, stream);  // kernels are loaded at their first call: not during a capture
  check(cudaStreamSynchronize(stream), "first call");
  Graph graph(call, whole_periods(kMinCalls), stream);
  double us = time_replays({&graph}, 1, stream)[0][0];
  if (us < kMinGraphUs) {
    const double calls = static_cast<double>(graph.calls()) * kMinGraphUs / std::max(us, 1.0);
    const int64_t wanted = whole_periods(static_cast<int64_t>(std::min(calls, static_cast<double>(kMaxCalls))) + 1);
    graph = Graph(call, wanted, stream);
    us = time_replays({&graph}, 1, stream)[0][0];
  }
  std::vector<double> each = time_replays({&graph}, replays_for(options, us), stream)[0];
  for (double& value : each) value /= static_cast<double>(graph.calls());
  return {median(each), smallest(each), largest(each), graph.calls(), static_cast<int64_t>(each.size())};
}

PairedTiming time_in_turn(const Graph& first, const Graph& second, const TimingOptions& options, cudaStream_t stream) {
  const std::vector<std::vector<double>> once = time_replays({&first, &second}, 1, stream);
  const int64_t replays = replays_for(options, once[0][0] + once[1][0]);
  std::vector<std::vector<double>> us = time_replays({&first, &second}, replays, stream);
  return {std::move(us[0]), std::move(us[1])};
}

}  // namespace polylora::bench
