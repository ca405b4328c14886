#include "side_stream.h"

#include "device.h"

namespace polylora::bench {

SideStream::SideStream(Order order) {
  int least = 0;
  int greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities of streams");
  const int priority = order == Order::kFirst ? greatest : 0;  // 0: of streams that were given none
  check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority), "cudaStreamCreate");
  for (cudaEvent_t* event : {&forked_, &joined_}) {
    check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreate");
  }
}

SideStream::~SideStream() {
  cudaEventDestroy(forked_);
  cudaEventDestroy(joined_);
  cudaStreamDestroy(stream_);
}

void SideStream::fork(cudaStream_t stream) const {
  check(cudaEventRecord(forked_, stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(stream_, forked_, 0), "cudaStreamWaitEvent");
}

void SideStream::join(cudaStream_t stream) const {
  check(cudaEventRecord(joined_, stream_), "cudaEventRecord");
  check(cudaStreamWaitEvent(stream, joined_, 0), "cudaStreamWaitEvent");
}

}  // namespace polylora::bench
