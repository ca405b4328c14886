#include "side_stream.h"

#include "device.h"

namespace polylora::bench {

SideStream::SideStream() {
  int least = 0;
  int greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities of streams");
  check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
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
