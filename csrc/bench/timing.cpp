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

// A graph long enough to be timed, of whole periods. The call has run before: kernels are loaded at their first call,
// and not during a capture.
Graph long_graph(const Call& call, int64_t period, cudaStream_t stream) {
  const auto whole_periods = [&](int64_t calls) { return (calls + period - 1) / period * period; };
  Graph graph(call, whole_periods(kMinCalls), stream);
  const double us = time_replays({&graph}, 1, stream)[0][0];
  if (us >= kMinGraphUs) return graph;
  const double calls = static_cast<double>(graph.calls()) * kMinGraphUs / std::max(us, 1.0);
  const int64_t wanted = whole_periods(static_cast<int64_t>(std::min(calls, static_cast<double>(kMaxCalls))) + 1);
  return Graph(call, wanted, stream);
}

void run_once(const Call& call, cudaStream_t stream) {
  call(0, stream);
  check(cudaStreamSynchronize(stream), "first call");
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
  // kernels keep the priority of the stream that they were captured on
  const cudaError_t error = cudaGraphInstantiate(&exec_, graph, cudaGraphInstantiateFlagUseNodePriority);
  cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
  check(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
}

Graph::~Graph() {
  if (exec_) cudaGraphExecDestroy(exec_);
}

void Graph::replay(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch"); }

Timing time_calls(const Call& call, int64_t period, const TimingOptions& options, cudaStream_t stream) {
  run_once(call, stream);
  const Graph graph = long_graph(call, period, stream);
  const double us = time_replays({&graph}, 1, stream)[0][0];
  std::vector<double> each = time_replays({&graph}, replays_for(options, us), stream)[0];
  for (double& value : each) value /= static_cast<double>(graph.calls());
  return {median(each), smallest(each), largest(each), graph.calls(), static_cast<int64_t>(each.size())};
}

AddedTiming time_added(const Graph& with, const Graph& without, const TimingOptions& options, cudaStream_t stream) {
  const std::vector<const Graph*> both = {&with, &without};
  const std::vector<std::vector<double>> once = time_replays(both, 1, stream);
  const int64_t replays = replays_for(options, once[0][0] + once[1][0]);
  const std::vector<std::vector<double>> us = time_replays(both, replays, stream);
  const auto calls = static_cast<double>(with.calls());
  std::vector<double> base;
  std::vector<double> added;
  for (size_t i = 0; i < us[0].size(); ++i) {
    base.push_back(us[1][i] / calls);
    added.push_back((us[0][i] - us[1][i]) / calls);
  }
  const Timing timing{median(added), smallest(added), largest(added), with.calls(), replays};
  return {median(base), timing, quantile(added, 0.25), quantile(added, 0.75)};
}

AddedTiming time_added(const Call& with, const Call& without, int64_t period, const TimingOptions& options,
                       cudaStream_t stream) {
  run_once(without, stream);
  run_once(with, stream);
  const Graph alone = long_graph(without, period, stream);
  return time_added(Graph(with, alone.calls(), stream), alone, options, stream);
}

}  // namespace polylora::bench
