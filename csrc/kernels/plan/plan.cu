// plan, moe_plan: a stable sort of the rows by group, its runs and tiles, by one of two kernels. See
// docs/kernels/plan.md.
#include "plan/task.cuh"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

cudaError_t launch_plan(const RowSource& source, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const PlanTask task = plan_task(source);
  return source.p.rows <= kPlanSmallRows ? plan_small(task, device, stream) : plan_counted(task, device, stream);
}

}  // namespace

cudaError_t plan(const PlanParams& params, cudaStream_t stream) {
  return launch_plan(RowSource::dense(params), stream);
}

cudaError_t moe_plan(const MoePlanParams& params, cudaStream_t stream) {
  return launch_plan(RowSource::moe(params), stream);
}

}  // namespace polylora::cuda
