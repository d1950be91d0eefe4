#include "kernels/max_iou_assign.h"

#include <limits>
#include <tuple>

#include "../include/tensor.h"

// Messages for users come from dlkernels/boxes/assign.py; the checks here guard
// direct calls of the dispatcher's op.

namespace dlkernels {
namespace {

using Dtype = torch::headeronly::ScalarType;

void check_arguments(
    const Tensor& anchors,
    const Tensor& boxes,
    const Tensor& counts,
    const std::optional<Tensor>& valid) {
  STD_TORCH_CHECK(
      boxes.dim() == 3 && boxes.size(2) == 4 &&
          boxes.scalar_type() == Dtype::Float,
      "boxes must be float32 of shape [B, G, 4]");
  const int64_t images = boxes.size(0);
  STD_TORCH_CHECK(
      (anchors.dim() == 2 ||
       (anchors.dim() == 3 && anchors.size(0) == images)) &&
          anchors.size(anchors.dim() - 1) == 4 &&
          anchors.scalar_type() == Dtype::Float,
      "anchors must be float32 of shape [A, 4] or [B, A, 4]");
  const int64_t size = anchors.size(anchors.dim() - 2);
  STD_TORCH_CHECK(
      counts.dim() == 1 && counts.size(0) == images &&
          counts.scalar_type() == Dtype::Long,
      "counts must be int64 of shape [B]");
  STD_TORCH_CHECK(
      !valid || (valid->scalar_type() == Dtype::Bool &&
                 (valid->dim() == 1 ||
                  (valid->dim() == 2 && valid->size(0) == images)) &&
                 valid->size(valid->dim() - 1) == size),
      "valid must be bool of shape [A] or [B, A]");
}

// Turns a set of anchors from boxes into planes of coordinates.
void fill_planes(
    const float* boxes, const bool* valid, int64_t anchors, float* planes) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t a = 0; a < anchors; ++a) {
    for (int64_t side = 0; side < 4; ++side) {
      planes[side * anchors + a] = boxes[4 * a + side];
    }
    if (valid != nullptr && !valid[a]) {
      planes[a] = kInfinity;
      planes[2 * anchors + a] = -kInfinity;
    }
  }
}

std::tuple<Tensor, Tensor> max_iou_assign(
    const Tensor& anchors_,
    const Tensor& boxes_,
    const Tensor& counts_,
    const std::optional<Tensor>& valid_,
    double pos_iou,
    double neg_iou,
    bool low_quality) {
  check_arguments(anchors_, boxes_, counts_, valid_);
  const Tensor anchors = as_contiguous(anchors_);
  const Tensor boxes = as_contiguous(boxes_);
  const Tensor counts = as_contiguous(counts_);
  const auto valid = as_contiguous(valid_);
  const int64_t images = boxes.size(0);
  const int64_t most = boxes.size(1);
  const int64_t size = anchors.size(anchors.dim() - 2);
  const int64_t anchor_step = anchors.dim() == 2 ? 0 : 4 * size;
  const int64_t valid_step = !valid || valid->dim() == 1 ? 0 : size;
  const bool shared = anchor_step == 0 && valid_step == 0;

  Tensor assigned =
      torch::stable::new_empty(boxes, {images, size}, Dtype::Long);
  Tensor iou = empty_float(boxes, {images, size});
  const float* anchor_data = anchors.const_data_ptr<float>();
  const float* box_data = boxes.const_data_ptr<float>();
  const auto* count_data = counts.const_data_ptr<int64_t>();
  const auto* valid_data = static_cast<const bool*>(data_or_null(valid));
  auto* assigned_data = assigned.mutable_data_ptr<int64_t>();
  auto* iou_data = iou.mutable_data_ptr<float>();

  const auto& kernels = max_iou_kernels();
  const MaxIouThresholds thresholds{
      static_cast<float>(pos_iou), static_cast<float>(neg_iou)};
  Tensor planes = empty_float(boxes, {4, size});
  Tensor highest = empty_float(boxes, {most});
  auto* plane_data = planes.mutable_data_ptr<float>();
  auto* highest_data = highest.mutable_data_ptr<float>();
  for (int64_t image = 0; image < images; ++image) {
    const int64_t count = count_data[image];
    STD_TORCH_CHECK(
        count >= 0 && count <= most, "counts must lie between 0 and G");
    if (image == 0 || !shared) {
      fill_planes(
          anchor_data + image * anchor_step,
          valid_data == nullptr ? nullptr : valid_data + image * valid_step,
          size,
          plane_data);
    }
    const AnchorPlanes own{
        size,
        plane_data,
        plane_data + size,
        plane_data + 2 * size,
        plane_data + 3 * size,
        count,
        box_data + image * 4 * most};
    if (low_quality) {
      parallel_for(count, size, [&](int64_t begin, int64_t end) {
        kernels.highest(own, highest_data, begin, end);
      });
    }
    parallel_for(size, count + 1, [&](int64_t begin, int64_t end) {
      kernels.assign(
          own,
          thresholds,
          low_quality ? highest_data : nullptr,
          assigned_data + image * size,
          iou_data + image * size,
          begin,
          end);
    });
  }
  return {assigned, iou};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("max_iou_assign", TORCH_BOX(&max_iou_assign));
}

}  // namespace dlkernels
