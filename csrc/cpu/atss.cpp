#include "kernels/atss.h"

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

// Memory for the work on one box.
class Workspace {
 public:
  explicit Workspace(const atss::Assign& args)
      : capacity_(
            ceil_div(args.slots, kAtssSlotAlignment) * kAtssSlotAlignment),
        orders_(args.slots),
        anchors_(capacity_),
        floats_(6 * capacity_) {}

  AtssWorkspace view() {
    return {
        orders_.data(),
        anchors_.data(),
        floats_.data(),
        floats_.data() + 4 * capacity_,
        floats_.data() + 5 * capacity_,
        capacity_};
  }

 private:
  int64_t capacity_;
  std::vector<uint64_t> orders_;
  std::vector<int64_t> anchors_;
  std::vector<float> floats_;
};

struct Cpu {
  static const Tensor& readable(const Tensor& boxes) {
    return boxes;
  }

  static std::tuple<Tensor, Tensor> assign(
      const atss::Anchors& anchors, bool grid, const AtssTargets& targets) {
    const auto& kernels = atss_kernels();
    AtssResults results(anchors, grid, targets);
    const atss::Assign& args = results.args;
    const int64_t items = args.images * anchors.count;

    if (results.exclusions) {
      const atss::Exclude exclude = exclude_of(anchors, targets);
      parallel_for(
          items, 8 + 8 * exclude.num_ignore, [&](int64_t begin, int64_t end) {
            kernels.exclude(args, exclude, begin, end);
          });
    }
    // Excluded anchors are left out of the centres, so each image has its own.
    const bool shared = anchors.image_stride == 0 && !results.exclusions;
    const int64_t num_centres = grid ? 0 : shared ? anchors.count : items;
    Tensor centre_tensor = empty_float(targets.gt_boxes, {2, num_centres});
    auto* x = centre_tensor.mutable_data_ptr<float>();
    const AtssCentres centres{x, x + num_centres, shared ? 0 : anchors.count};
    parallel_for(num_centres, 4, [&](int64_t begin, int64_t end) {
      kernels.centres(args, centres, begin, end);
    });

    const std::vector<AtssBox> boxes = boxes_of(args);
    const int64_t cost = 32 * args.slots + (grid ? 0 : anchors.count / 4);
    parallel_for(boxes.size(), cost, [&](int64_t begin, int64_t end) {
      Workspace workspace(args);
      kernels.claim(args, centres, boxes.data(), workspace.view(), begin, end);
    });
    auto* assigned = results.assigned.mutable_data_ptr<int64_t>();
    auto* iou = results.iou.mutable_data_ptr<float>();
    parallel_for(items, 4, [&](int64_t begin, int64_t end) {
      kernels.resolve(args, assigned, iou, begin, end);
    });
    return {results.assigned, results.iou};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("atss_assign", TORCH_BOX(&AtssOps<Cpu>::assign));
  m.impl("atss_assign_grid", TORCH_BOX(&AtssOps<Cpu>::assign_grid));
}

}  // namespace dlkernels
