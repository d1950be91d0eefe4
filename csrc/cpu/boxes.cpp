#include <string>

#include "../include/tensor.h"
#include "kernels/boxes.h"

// The detection losses. Messages for users come from dlkernels/boxes/op.py; the
// checks here guard direct calls of the dispatcher's ops.

namespace dlkernels {
namespace {

using Dtype = torch::headeronly::ScalarType;

BoxLoss box_loss_of(const std::string& name) {
  if (name == "iou") {
    return BoxLoss::Iou;
  }
  if (name == "giou") {
    return BoxLoss::Giou;
  }
  if (name == "diou") {
    return BoxLoss::Diou;
  }
  STD_TORCH_CHECK(
      name == "ciou", "kind must be iou, giou, diou or ciou, but is ", name);
  return BoxLoss::Ciou;
}

void check_like(const Tensor& tensor, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(
      tensor.sizes() == other.sizes() &&
          tensor.scalar_type() == other.scalar_type(),
      name,
      " must have the shape and dtype of the predictions");
}

Tensor empty_losses(const Tensor& like, int64_t dims, bool summed) {
  return torch::stable::empty(
      like.sizes().slice(0, summed ? 0 : dims),
      Dtype::Float,
      std::nullopt,
      like.device(),
      std::nullopt,
      MemoryFormat::Contiguous);
}

// The gradient of a loss in float32, one per element or one for all.
struct LossGrad {
  Tensor values;
  bool shared;

  LossGrad(const Tensor& grad_out, const Tensor& like, int64_t dims)
      : values(as_contiguous(grad_out)), shared(grad_out.dim() == 0) {
    STD_TORCH_CHECK(
        grad_out.scalar_type() == Dtype::Float &&
            (shared || grad_out.sizes() == like.sizes().slice(0, dims)),
        "grad_out must be float32 and have the shape of the loss");
  }

  const float* data() const {
    return values.const_data_ptr<float>();
  }
};

// Fills `loss`, or the sum of the blocks' sums where `loss` is a scalar, by
// pass(loss, sums, begin, end).
template <typename Pass>
void run_loss(
    int64_t count,
    int64_t cost,
    bool summed,
    const Tensor& loss,
    const Pass& pass) {
  const int64_t blocks = ceil_div(count, kLossBlock);
  auto* data = loss.mutable_data_ptr<float>();
  if (!summed) {
    parallel_for(blocks, cost * kLossBlock, [&](int64_t begin, int64_t end) {
      pass(data, nullptr, begin, end);
    });
    return;
  }
  const Tensor sums = empty_float(loss, {blocks});
  auto* sums_data = sums.mutable_data_ptr<float>();
  parallel_for(blocks, cost * kLossBlock, [&](int64_t begin, int64_t end) {
    pass(nullptr, sums_data, begin, end);
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    total += sums_data[block];
  }
  *data = static_cast<float>(total);
}

// ---- IoU losses -------------------------------------------------------------

constexpr int64_t kBoxCost = 16;

BoxPairs box_pairs(
    const Tensor& pred,
    const Tensor& target,
    const std::string& kind,
    double eps) {
  return {
      scalar_type_of(pred, "pred"),
      box_loss_of(kind),
      static_cast<float>(eps),
      pred.numel() / 4,
      pred.const_data_ptr(),
      target.const_data_ptr()};
}

void check_boxes(const Tensor& pred, const Tensor& target) {
  STD_TORCH_CHECK(
      pred.dim() > 0 && pred.size(pred.dim() - 1) == 4,
      "pred must have shape [..., 4]");
  check_like(target, pred, "target");
}

Tensor box_iou_loss(
    const Tensor& pred_,
    const Tensor& target_,
    const std::string& kind,
    bool summed,
    double eps) {
  check_boxes(pred_, target_);
  const Tensor pred = as_contiguous(pred_);
  const Tensor target = as_contiguous(target_);
  const BoxPairs pairs = box_pairs(pred, target, kind, eps);
  Tensor loss = empty_losses(pred, pred.dim() - 1, summed);
  const auto& kernels = boxes_kernels();
  run_loss(
      pairs.count,
      kBoxCost,
      summed,
      loss,
      [&](float* losses, float* sums, int64_t begin, int64_t end) {
        kernels.box_iou_loss(pairs, losses, sums, begin, end);
      });
  return loss;
}

Tensor box_iou_loss_backward(
    const Tensor& grad_out_,
    const Tensor& pred_,
    const Tensor& target_,
    const std::string& kind,
    double eps) {
  check_boxes(pred_, target_);
  const LossGrad grad_out(grad_out_, pred_, pred_.dim() - 1);
  const Tensor pred = as_contiguous(pred_);
  const Tensor target = as_contiguous(target_);
  const BoxPairs pairs = box_pairs(pred, target, kind, eps);
  Tensor grad_pred = empty_maps(pred, MemoryFormat::Contiguous);
  const auto& kernels = boxes_kernels();
  const float* grad_data = grad_out.data();
  void* grad_pred_data = grad_pred.mutable_data_ptr();
  parallel_for(
      ceil_div(pairs.count, kLossBlock),
      kBoxCost * kLossBlock,
      [&](int64_t begin, int64_t end) {
        kernels.box_iou_loss_backward(
            pairs, grad_data, grad_out.shared, grad_pred_data, begin, end);
      });
  return grad_pred;
}

// ---- focal loss -------------------------------------------------------------

constexpr int64_t kFocalCost = 8;

// Logits with targets of either form, all contiguous.
struct FocalInputs {
  Tensor logits;
  Tensor targets;
  std::optional<Tensor> weight;

  FocalInputs(
      const Tensor& logits_,
      const Tensor& targets_,
      const std::optional<Tensor>& weight_)
      : logits(as_contiguous(logits_)),
        targets(as_contiguous(targets_)),
        weight(as_contiguous(weight_)) {
    STD_TORCH_CHECK(logits.dim() > 0, "logits must have shape [..., C]");
    if (has_labels()) {
      check_rows(targets, "targets");
    } else {
      check_like(targets, logits, "targets");
    }
    if (weight) {
      STD_TORCH_CHECK(
          weight->scalar_type() == Dtype::Float, "weight must be float32");
      check_rows(*weight, "weight");
    }
  }

  bool has_labels() const {
    return targets.scalar_type() == Dtype::Long;
  }

  FocalRows rows(double negative, double positive, double gamma) const {
    return {
        scalar_type_of(logits, "logits"),
        logits.numel(),
        std::max<int64_t>(1, logits.size(logits.dim() - 1)),
        logits.const_data_ptr(),
        has_labels() ? targets.const_data_ptr<int64_t>() : nullptr,
        has_labels() ? nullptr : targets.const_data_ptr(),
        weight ? weight->const_data_ptr<float>() : nullptr,
        static_cast<float>(negative),
        static_cast<float>(positive),
        static_cast<float>(gamma)};
  }

 private:
  void check_rows(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(
        tensor.sizes() == logits.sizes().slice(0, logits.dim() - 1),
        name,
        " must have one value per row of logits");
  }
};

Tensor sigmoid_focal_loss(
    const Tensor& logits,
    const Tensor& targets,
    const std::optional<Tensor>& weight,
    double negative,
    double positive,
    double gamma,
    bool summed) {
  const FocalInputs inputs(logits, targets, weight);
  const FocalRows rows = inputs.rows(negative, positive, gamma);
  Tensor loss = empty_losses(logits, logits.dim(), summed);
  const auto& kernels = boxes_kernels();
  run_loss(
      rows.count,
      kFocalCost,
      summed,
      loss,
      [&](float* losses, float* sums, int64_t begin, int64_t end) {
        kernels.focal_loss(rows, losses, sums, begin, end);
      });
  return loss;
}

Tensor sigmoid_focal_loss_backward(
    const Tensor& grad_out_,
    const Tensor& logits,
    const Tensor& targets,
    const std::optional<Tensor>& weight,
    double negative,
    double positive,
    double gamma) {
  const FocalInputs inputs(logits, targets, weight);
  const LossGrad grad_out(grad_out_, logits, logits.dim());
  const FocalRows rows = inputs.rows(negative, positive, gamma);
  Tensor grad_logits = empty_maps(inputs.logits, MemoryFormat::Contiguous);
  const auto& kernels = boxes_kernels();
  const float* grad_data = grad_out.data();
  void* grad_logits_data = grad_logits.mutable_data_ptr();
  parallel_for(
      ceil_div(rows.count, kLossBlock),
      kFocalCost * kLossBlock,
      [&](int64_t begin, int64_t end) {
        kernels.focal_loss_backward(
            rows, grad_data, grad_out.shared, grad_logits_data, begin, end);
      });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("box_iou_loss", TORCH_BOX(&box_iou_loss));
  m.impl("box_iou_loss_backward", TORCH_BOX(&box_iou_loss_backward));
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss));
  m.impl(
      "sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward));
}

}  // namespace dlkernels
