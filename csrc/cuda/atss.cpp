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
      const atss::Anchors& anchors,
      bool grid,
      const Tensor& gt_boxes_,
      const Tensor& num_gt,
      const std::optional<Tensor>& gt_ignore_,
      const std::optional<Tensor>& valid,
      int64_t k,
      double ignore_iof_thr) {
    using torch::headeronly::ScalarType;
    const torch::stable::accelerator::DeviceGuard guard(
        gt_boxes_.get_device_index());
    const Tensor gt_boxes = readable(gt_boxes_);
    const auto gt_ignore = readable(gt_ignore_);
    const int64_t images = gt_boxes.size(0);
    const int64_t max_boxes = gt_boxes.size(1);
    const int64_t slots = slots_of(anchors, k);
    STD_TORCH_CHECK(
        images * max_boxes < int64_t{1} << 31 &&
            images * anchors.count < int64_t{1} << 37,
        "a batch may have fewer than 2^31 boxes and 2^37 anchors on CUDA");
    Tensor assigned = torch::stable::new_zeros(
        gt_boxes, {images, anchors.count}, ScalarType::Long);
    Tensor iou = empty_float(gt_boxes, {images, anchors.count});
    Tensor candidates = torch::stable::new_empty(
        gt_boxes,
        {images * max_boxes * slots,
         static_cast<int64_t>(sizeof(AtssCandidate))},
        ScalarType::Byte);
    std::optional<Tensor> exclusions;
    if (gt_ignore || valid) {
      exclusions = torch::stable::new_empty(
          gt_boxes, {images * anchors.count}, ScalarType::Byte);
    }
    auto* assigned_data = assigned.mutable_data_ptr<int64_t>();
    atss_assign(
        AtssAssign{
            atss::Assign{
                anchors,
                grid,
                images,
                max_boxes,
                gt_boxes.const_data_ptr<float>(),
                num_gt.const_data_ptr<int64_t>(),
                k,
                slots,
                exclusions ? static_cast<atss::Exclusion*>(
                                 exclusions->mutable_data_ptr())
                           : nullptr,
                reinterpret_cast<uint64_t*>(assigned_data)},
            exclude_of(anchors, gt_ignore, valid, ignore_iof_thr),
            static_cast<AtssCandidate*>(candidates.mutable_data_ptr()),
            assigned_data,
            iou.mutable_data_ptr<float>()},
        stream_of(gt_boxes));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {assigned, iou};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels_cuda, CUDA, m) {
  m.impl("atss_assign", TORCH_BOX(&AtssOps<Cuda>::assign));
  m.impl("atss_assign_grid", TORCH_BOX(&AtssOps<Cuda>::assign_grid));
}

}  // namespace dlkernels::cuda
