// A second stream for what runs beside the first one's kernels, for eager calls and for captures of the first.
#pragma once

#include <cuda_runtime_api.h>

namespace polylora::bench {

class SideStream {
 public:
  /// kFirst: of the highest priority, for few blocks, which would come after the last wave of those beside them.
  enum class Order { kAlike, kFirst };

  explicit SideStream(Order order);
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  ~SideStream();

  operator cudaStream_t() const { return stream_; }

  /// What this stream is given next waits for all that `stream` was given; a capture of `stream` takes it in.
  void fork(cudaStream_t stream) const;

  /// What `stream` is given next waits for all that this one was given.
  void join(cudaStream_t stream) const;

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr;
  cudaEvent_t joined_ = nullptr;
};

}  // namespace polylora::bench
