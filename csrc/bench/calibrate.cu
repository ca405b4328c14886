#include "calibrate.h"

#include <algorithm>

#include "rotation.h"
#include "timing.h"

namespace polylora::bench {
namespace {

__global__ void empty_kernel() {}

// What a kernel that lets the next one start early and waits for the one before costs.
__global__ void empty_pdl_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A load of 16 bytes is kept only where its words sum to one value, so that none can be left out.
template <int kUnroll>
__global__ void read_kernel(const uint4* data, int64_t n, uint32_t* sink) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kUnroll;
  uint32_t sum = 0;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x * kUnroll + threadIdx.x; at < n; at += step) {
    uint4 value[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t index = at + i * blockDim.x;
      value[i] = index < n ? data[index] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sum += value[i].x ^ value[i].y ^ value[i].z ^ value[i].w;
  }
  if (sum == 0x12345677u) *sink = sum;
}

template <int kUnroll>
__global__ void read_write_kernel(uint4* data, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kUnroll;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x * kUnroll + threadIdx.x; at < n; at += step) {
    uint4 value[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t index = at + i * blockDim.x;
      if (index < n) value[i] = data[index];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t index = at + i * blockDim.x;
      value[i].x += 2;
      if (index < n) data[index] = value[i];
    }
  }
}

void launch_empty(int blocks, bool pdl, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(128);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = pdl ? 1 : 0;
  check(cudaLaunchKernelEx(&config, pdl ? empty_pdl_kernel : empty_kernel), "empty kernel");
}

// Ways to stream: few bytes want many small blocks, many bytes several loads in flight a thread. The best one counts.
struct Streaming {
  int threads;
  int unroll;
};
constexpr Streaming kStreaming[] = {{128, 1}, {256, 2}, {512, 4}, {512, 8}};

template <int kUnroll>
void launch_streaming(const Streaming& way, int sms, char* data, int64_t bytes, bool write, uint32_t* sink,
                      cudaStream_t stream) {
  const int64_t n = bytes / 16;
  const int64_t blocks = (n + way.threads * kUnroll - 1) / (way.threads * kUnroll);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, int64_t{sms} * (2048 / way.threads)));
  if (write) {
    read_write_kernel<kUnroll><<<grid, way.threads, 0, stream>>>(reinterpret_cast<uint4*>(data), n);
  } else {
    read_kernel<kUnroll><<<grid, way.threads, 0, stream>>>(reinterpret_cast<const uint4*>(data), n, sink);
  }
  check(cudaGetLastError(), "calibration kernel");
}

void stream_bytes(const Streaming& way, int sms, char* data, int64_t bytes, bool write, uint32_t* sink,
                  cudaStream_t stream) {
  switch (way.unroll) {
    case 1:
      return launch_streaming<1>(way, sms, data, bytes, write, sink, stream);
    case 2:
      return launch_streaming<2>(way, sms, data, bytes, write, sink, stream);
    case 4:
      return launch_streaming<4>(way, sms, data, bytes, write, sink, stream);
    default:
      return launch_streaming<8>(way, sms, data, bytes, write, sink, stream);
  }
}

}  // namespace

Calibration calibrate(const Device& device, cudaStream_t stream) {
  const TimingOptions options{15, 0};
  Calibration result;
  for (const int blocks : {128, 512}) {
    EmptyKernel empty{blocks, 0, 0};
    const auto time = [&](bool pdl) {
      return time_calls([&](int64_t, cudaStream_t s) { launch_empty(blocks, pdl, s); }, 1, options, stream).median;
    };
    empty.plain_us = time(false);
    if (device.major >= 9) empty.pdl_us = time(true);
    result.empty.push_back(empty);
  }

  DeviceLimits& limits = result.limits;
  limits.name = device.name;
  limits.node_us = result.empty[0].plain_us;
  limits.node_pdl_us = result.empty[0].pdl_us;
  limits.mib = h100_limits().mib;
  const int64_t cold_bytes = kColdL2s * device.l2_bytes;
  const auto largest = static_cast<int64_t>(limits.mib.back() * kMiB);
  DeviceBuffer data(cold_bytes + largest, "calibration");
  DeviceBuffer sink(16, "calibration");
  fill_random_bits(data.as<void>(), data.bytes(), 1, stream);
  for (const double mib : limits.mib) {
    const auto bytes = static_cast<int64_t>(mib * kMiB);
    const int64_t regions = std::max<int64_t>(1, (cold_bytes + bytes - 1) / bytes);
    const auto best = [&](bool write, int64_t period) {
      double us = 0;
      for (const Streaming& way : kStreaming) {
        const auto call = [&](int64_t i, cudaStream_t s) {
          stream_bytes(way, device.sms, data.at(i % period * bytes), bytes, write, sink.as<uint32_t>(), s);
        };
        const double median = time_calls(call, period, options, stream).median;
        us = us == 0 ? median : std::min(us, median);
      }
      return us;
    };
    limits.read_cold_us.push_back(best(false, regions));
    limits.read_hot_us.push_back(best(false, 1));
    limits.write_cold_us.push_back(best(true, regions));
    limits.write_hot_us.push_back(best(true, 1));
  }
  limits.read_tbps = largest / limits.read_cold_us.back() / kTbpsToBytesPerUs;
  limits.write_tbps = 2 * largest / limits.write_cold_us.back() / kTbpsToBytesPerUs;
  return result;
}

}  // namespace polylora::bench
