#pragma once

// What the launchers of ATSS assignment check before any memory is touched, and
// how they read its arguments. Messages for users come from
// dlkernels/atss/op.py; these guard direct calls of the dispatcher's ops.

#include <tuple>
#include <vector>

#include "atss.h"
#include "tensor.h"

namespace dlkernels {

inline void check_boxes(
    const Tensor& boxes, const char* name, const char* shape, bool fits) {
  STD_TORCH_CHECK(fits, name, " must have shape ", shape);
  STD_TORCH_CHECK(
      boxes.scalar_type() == torch::headeronly::ScalarType::Float &&
          boxes.is_contiguous(),
      name,
      " must be contiguous and float32");
}

// Arbitrary anchors: [A, 4], or [B, A, 4] with each image's own.
inline atss::Anchors anchors_of(
    const Tensor& boxes, const std::vector<int64_t>& num_level_anchors) {
  const int64_t dims = boxes.dim();
  check_boxes(
      boxes,
      "anchors",
      "[A, 4] or [B, A, 4]",
      (dims == 2 || dims == 3) && boxes.size(dims - 1) == 4);
  const auto levels = static_cast<int64_t>(num_level_anchors.size());
  STD_TORCH_CHECK(
      levels <= atss::kMaxLevels,
      "num_level_anchors must have at most 16 levels");
  atss::Anchors anchors{};
  anchors.boxes = boxes.const_data_ptr<float>();
  anchors.per_cell = 1;
  anchors.num_levels = levels;
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t count = num_level_anchors[l];
    STD_TORCH_CHECK(
        count >= 0 && count < int64_t{1} << 32,
        "num_level_anchors must lie between 0 and 2^32");
    anchors.levels[l] = {anchors.count, count, 1, count, 0.0f};
    anchors.count += count;
  }
  STD_TORCH_CHECK(
      anchors.count == boxes.size(dims - 2),
      "num_level_anchors must add up to the number of anchors");
  anchors.image_stride = dims == 3 ? 4 * anchors.count : 0;
  return anchors;
}

// Anchors on grids: `sizes` holds height and width of each level.
inline atss::Anchors anchors_of(
    const Tensor& base_anchors,
    const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides,
    double offset) {
  const auto levels = static_cast<int64_t>(strides.size());
  check_boxes(
      base_anchors,
      "base_anchors",
      "[levels, A, 4]",
      base_anchors.dim() == 3 && base_anchors.size(0) == levels &&
          base_anchors.size(1) > 0 && base_anchors.size(2) == 4);
  STD_TORCH_CHECK(
      levels <= atss::kMaxLevels &&
          sizes.size() == 2 * static_cast<size_t>(levels),
      "sizes must hold height and width of at most 16 levels");
  atss::Anchors anchors{};
  anchors.boxes = base_anchors.const_data_ptr<float>();
  anchors.per_cell = base_anchors.size(1);
  anchors.offset = static_cast<float>(offset);
  anchors.num_levels = levels;
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t height = sizes[2 * l];
    const int64_t width = sizes[2 * l + 1];
    STD_TORCH_CHECK(
        height >= 0 && width >= 0 && strides[l] > 0,
        "sizes must not be negative, and strides must be positive");
    const int64_t count = height * width * anchors.per_cell;
    STD_TORCH_CHECK(
        height < int64_t{1} << 31 && width < int64_t{1} << 31 &&
            count < int64_t{1} << 32,
        "a level must have fewer than 2^32 anchors");
    anchors.levels[l] = {
        anchors.count, count, height, width, static_cast<float>(strides[l])};
    anchors.count += count;
  }
  return anchors;
}

// What both ops take beside anchors.
struct AtssTargets {
  Tensor gt_boxes;
  Tensor num_gt;
  std::optional<Tensor> gt_ignore;
  std::optional<Tensor> valid;
  int64_t k;
  double ignore_iof_thr;
};

inline void check_targets(
    const atss::Anchors& anchors, const AtssTargets& targets) {
  const auto& [gt_boxes, num_gt, gt_ignore, valid, k, ignore_iof_thr] = targets;
  check_boxes(
      gt_boxes,
      "gt_boxes",
      "[B, G, 4]",
      gt_boxes.dim() == 3 && gt_boxes.size(2) == 4);
  const int64_t images = gt_boxes.size(0);
  STD_TORCH_CHECK(
      num_gt.dim() == 1 && num_gt.size(0) == images && num_gt.is_contiguous() &&
          num_gt.scalar_type() == torch::headeronly::ScalarType::Long,
      "num_gt must have shape [B], be contiguous and int64");
  if (gt_ignore) {
    check_boxes(
        *gt_ignore,
        "gt_ignore",
        "[B, I, 4]",
        gt_ignore->dim() == 3 && gt_ignore->size(0) == images &&
            gt_ignore->size(2) == 4);
  }
  if (valid) {
    const int64_t dims = valid->dim();
    STD_TORCH_CHECK(
        (dims == 1 || (dims == 2 && valid->size(0) == images)) &&
            valid->size(dims - 1) == anchors.count && valid->is_contiguous() &&
            valid->scalar_type() == torch::headeronly::ScalarType::Bool,
        "valid must have shape [A] or [B, A], be contiguous and bool");
  }
  STD_TORCH_CHECK(k > 0, "k must be positive");
}

inline atss::Exclude exclude_of(
    const atss::Anchors& anchors, const AtssTargets& targets) {
  atss::Exclude exclude{};
  if (targets.valid) {
    exclude.valid = targets.valid->const_data_ptr<bool>();
    exclude.valid_image_stride = targets.valid->dim() == 2 ? anchors.count : 0;
  }
  if (targets.gt_ignore) {
    exclude.ignore_boxes = targets.gt_ignore->const_data_ptr<float>();
    exclude.num_ignore = targets.gt_ignore->size(1);
    exclude.ignore_iof = static_cast<float>(targets.ignore_iof_thr);
  }
  return exclude;
}

inline int64_t slots_of(const atss::Anchors& anchors, int64_t k) {
  int64_t slots = 0;
  for (int64_t l = 0; l < anchors.num_levels; ++l) {
    slots += std::min(k, anchors.levels[l].count);
  }
  return slots;
}

// The results of both ops, and what kernels need to write them.
struct AtssResults {
  Tensor assigned;
  Tensor iou;
  std::optional<Tensor> exclusions;
  atss::Assign args;

  AtssResults(
      const atss::Anchors& anchors, bool grid, const AtssTargets& targets) {
    using torch::headeronly::ScalarType;
    const Tensor& boxes = targets.gt_boxes;
    const int64_t images = boxes.size(0);
    assigned = torch::stable::new_zeros(
        boxes, {images, anchors.count}, ScalarType::Long);
    iou = empty_float(boxes, {images, anchors.count});
    if (targets.gt_ignore || targets.valid) {
      exclusions = torch::stable::new_empty(
          boxes, {images * anchors.count}, ScalarType::Byte);
    }
    args = {
        anchors,
        grid,
        images,
        boxes.size(1),
        boxes.const_data_ptr<float>(),
        targets.num_gt.const_data_ptr<int64_t>(),
        targets.k,
        slots_of(anchors, targets.k),
        exclusions
            ? static_cast<atss::Exclusion*>(exclusions->mutable_data_ptr())
            : nullptr,
        static_cast<uint64_t*>(assigned.mutable_data_ptr())};
  }
};

// The dispatcher's two ops on a device. Device::readable(boxes) are the boxes
// where its kernels can read them, Device::assign does the work.
template <typename Device>
struct AtssOps {
  static std::tuple<Tensor, Tensor> assign(
      const Tensor& anchors_,
      std::vector<int64_t> num_level_anchors,
      const Tensor& gt_boxes,
      const Tensor& num_gt,
      const std::optional<Tensor>& gt_ignore,
      const std::optional<Tensor>& valid,
      int64_t k,
      double ignore_iof_thr) {
    const AtssTargets targets{
        gt_boxes, num_gt, gt_ignore, valid, k, ignore_iof_thr};
    const Tensor boxes = Device::readable(anchors_);
    const atss::Anchors anchors = anchors_of(boxes, num_level_anchors);
    check_targets(anchors, targets);
    STD_TORCH_CHECK(
        boxes.dim() == 2 || boxes.size(0) == gt_boxes.size(0),
        "anchors must have as many images as gt_boxes");
    return Device::assign(anchors, false, targets);
  }

  static std::tuple<Tensor, Tensor> assign_grid(
      const Tensor& base_anchors_,
      std::vector<int64_t> sizes,
      std::vector<int64_t> strides,
      double offset,
      const Tensor& gt_boxes,
      const Tensor& num_gt,
      const std::optional<Tensor>& gt_ignore,
      const std::optional<Tensor>& valid,
      int64_t k,
      double ignore_iof_thr) {
    const AtssTargets targets{
        gt_boxes, num_gt, gt_ignore, valid, k, ignore_iof_thr};
    const Tensor base_anchors = Device::readable(base_anchors_);
    const atss::Anchors anchors =
        anchors_of(base_anchors, sizes, strides, offset);
    check_targets(anchors, targets);
    return Device::assign(anchors, true, targets);
  }
};

}  // namespace dlkernels
