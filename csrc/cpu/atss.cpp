#include "kernels/atss.h"

#include <tuple>
#include <vector>

#include "../include/atss_checks.h"

namespace dlkernels {
namespace {

// The boxes without padding, so that threads share the real ones out evenly.
std::vector<AtssBox> boxes_of(const atss::Assign& args) {
  std::vector<AtssBox> boxes;
  for (int64_t image = 0; image < args.images; ++image) {
    const int64_t count = std::min(args.counts[image], args.max_boxes);
    for (int64_t box = 0; box < count; ++box) {
      boxes.push_back({image, box});
    }
  }
  return boxes;
}

struct CentreTensors {
  Tensor x;
  Tensor y;
};

CentreTensors centres_of(const Tensor& anchors) {
  const int64_t count = anchors.numel() / 4;
  CentreTensors centres{
      empty_float(anchors, {count}), empty_float(anchors, {count})};
  const auto* boxes = anchors.const_data_ptr<float>();
  auto* x = centres.x.mutable_data_ptr<float>();
  auto* y = centres.y.mutable_data_ptr<float>();
  parallel_for(count, 4, [&](int64_t begin, int64_t end) {
    atss_kernels().centres(boxes, x, y, begin, end);
  });
  return centres;
}

std::tuple<Tensor, Tensor> assign(
    const atss::Anchors& anchors,
    const AtssCentres& centres,
    const Tensor& gt_boxes,
    const Tensor& num_gt,
    const std::optional<Tensor>& gt_ignore,
    const std::optional<Tensor>& valid,
    int64_t k,
    double ignore_iof_thr) {
  using torch::headeronly::ScalarType;
  const auto& kernels = atss_kernels();
  const int64_t images = gt_boxes.size(0);
  const int64_t items = images * anchors.count;
  Tensor assigned = torch::stable::new_zeros(
      gt_boxes, {images, anchors.count}, ScalarType::Long);
  Tensor iou = empty_float(gt_boxes, {images, anchors.count});
  auto* assigned_data = assigned.mutable_data_ptr<int64_t>();
  auto* iou_data = iou.mutable_data_ptr<float>();

  std::optional<Tensor> exclusions;
  if (gt_ignore || valid) {
    exclusions = torch::stable::new_empty(gt_boxes, {items}, ScalarType::Byte);
  }
  const atss::Assign args{
      anchors,
      centres.x == nullptr,
      images,
      gt_boxes.size(1),
      gt_boxes.const_data_ptr<float>(),
      num_gt.const_data_ptr<int64_t>(),
      k,
      slots_of(anchors, k),
      exclusions ? static_cast<atss::Exclusion*>(exclusions->mutable_data_ptr())
                 : nullptr,
      reinterpret_cast<uint64_t*>(assigned_data)};

  if (exclusions) {
    const atss::Exclude exclude =
        exclude_of(anchors, gt_ignore, valid, ignore_iof_thr);
    parallel_for(
        items, 8 + 8 * exclude.num_ignore, [&](int64_t begin, int64_t end) {
          kernels.exclude(args, exclude, begin, end);
        });
  }
  const std::vector<AtssBox> boxes = boxes_of(args);
  const int64_t cost = 64 * args.slots + (args.grid ? 0 : anchors.count / 4);
  parallel_for(boxes.size(), cost, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> orders(args.slots);
    std::vector<atss::Candidate> candidates(args.slots);
    kernels.claim(
        args,
        centres,
        boxes.data(),
        orders.data(),
        candidates.data(),
        begin,
        end);
  });
  parallel_for(items, 4, [&](int64_t begin, int64_t end) {
    kernels.resolve(args, assigned_data, iou_data, begin, end);
  });
  return {assigned, iou};
}

std::tuple<Tensor, Tensor> atss_assign(
    const Tensor& anchors_,
    std::vector<int64_t> num_level_anchors,
    const Tensor& gt_boxes,
    const Tensor& num_gt,
    const std::optional<Tensor>& gt_ignore,
    const std::optional<Tensor>& valid,
    int64_t k,
    double ignore_iof_thr) {
  const atss::Anchors anchors = anchors_of(anchors_, num_level_anchors);
  check_targets(anchors, gt_boxes, num_gt, gt_ignore, valid, k);
  STD_TORCH_CHECK(
      anchors_.dim() == 2 || anchors_.size(0) == gt_boxes.size(0),
      "anchors must have as many images as gt_boxes");
  const CentreTensors centres = centres_of(anchors_);
  return assign(
      anchors,
      {centres.x.const_data_ptr<float>(),
       centres.y.const_data_ptr<float>(),
       anchors.image_stride / 4},
      gt_boxes,
      num_gt,
      gt_ignore,
      valid,
      k,
      ignore_iof_thr);
}

std::tuple<Tensor, Tensor> atss_assign_grid(
    const Tensor& base_anchors,
    std::vector<int64_t> sizes,
    std::vector<int64_t> strides,
    double offset,
    const Tensor& gt_boxes,
    const Tensor& num_gt,
    const std::optional<Tensor>& gt_ignore,
    const std::optional<Tensor>& valid,
    int64_t k,
    double ignore_iof_thr) {
  const atss::Anchors anchors =
      anchors_of(base_anchors, sizes, strides, offset);
  check_targets(anchors, gt_boxes, num_gt, gt_ignore, valid, k);
  return assign(
      anchors, {}, gt_boxes, num_gt, gt_ignore, valid, k, ignore_iof_thr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("atss_assign", TORCH_BOX(&atss_assign));
  m.impl("atss_assign_grid", TORCH_BOX(&atss_assign_grid));
}

}  // namespace dlkernels
