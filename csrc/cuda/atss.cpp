#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../include/atss_checks.h"
#include "current_stream.h"
#include "kernels/atss.h"

namespace dlkernels::cuda {
namespace {

struct Cuda {
  // Kernels read whole boxes, 16 bytes at a time.
  static Tensor readable(const Tensor& boxes) {
    const auto address = reinterpret_cast<uintptr_t>(boxes.const_data_ptr());
    return address % 16 == 0 ? boxes : torch::stable::clone(boxes);
  }

  static std::optional<Tensor> readable(const std::optional<Tensor>& boxes) {
    return boxes ? std::optional<Tensor>(readable(*boxes)) : std::nullopt;
  }

  static std::tuple<Tensor, Tensor> assign(
      const atss::Anchors& anchors, bool grid, AtssTargets targets) {
    const torch::stable::accelerator::DeviceGuard guard(
        targets.gt_boxes.get_device_index());
    targets.gt_boxes = readable(targets.gt_boxes);
    targets.gt_ignore = readable(targets.gt_ignore);
    const int64_t all_boxes =
        targets.gt_boxes.size(0) * targets.gt_boxes.size(1);
    STD_TORCH_CHECK(
        all_boxes < int64_t{1} << 31 &&
            targets.gt_boxes.size(0) * anchors.count < int64_t{1} << 37,
        "a batch may have fewer than 2^31 boxes and 2^37 anchors on CUDA");
    AtssResults results(anchors, grid, targets);
    Tensor candidates = torch::stable::new_empty(
        targets.gt_boxes,
        {all_boxes * results.args.slots,
         static_cast<int64_t>(sizeof(AtssCandidate))},
        torch::headeronly::ScalarType::Byte);
    atss_assign(
        AtssAssign{
            results.args,
            exclude_of(anchors, targets),
            static_cast<AtssCandidate*>(candidates.mutable_data_ptr()),
            results.assigned.mutable_data_ptr<int64_t>(),
            results.iou.mutable_data_ptr<float>()},
        stream_of(targets.gt_boxes));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {results.assigned, results.iou};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels_cuda, CUDA, m) {
  m.impl("atss_assign", TORCH_BOX(&AtssOps<Cuda>::assign));
  m.impl("atss_assign_grid", TORCH_BOX(&AtssOps<Cuda>::assign_grid));
}

}  // namespace dlkernels::cuda
