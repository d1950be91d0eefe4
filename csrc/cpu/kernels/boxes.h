#pragma once

#include "../../include/scalar_types.h"
#include "../capability.h"

// The detection losses. Each function works on a range of blocks of
// kLossBlock elements (pairs of boxes, or logits), so that a launcher can
// share the blocks out among threads; a sum has one term per block, so that it
// does not depend on how many threads there are.

namespace dlkernels {

constexpr int64_t kLossBlock = 4096;

enum class BoxLoss : int32_t { Iou, Giou, Diou, Ciou };

struct BoxPairs {
  ScalarType dtype;
  BoxLoss kind;
  float eps;
  int64_t count;
  const void* pred;    // [count, 4]
  const void* target;  // [count, 4]
};

// Logits with their targets, of which one of the two forms is null.
struct FocalRows {
  ScalarType dtype;
  int64_t count;    // of logits
  int64_t classes;  // of a row
  const void* logits;
  const int64_t* labels;  // of each row
  const void* targets;    // like logits
  const float* weight;    // of each row, or null
  float negative;
  float positive;
  float gamma;
};

// The forward functions write a loss per element, or a sum per block where
// `sums` is given. The backward functions read a gradient per element, or one
// for all where `shared_grad` is set.
struct BoxesKernels {
  void (*box_iou_loss)(
      const BoxPairs&, float* loss, float* sums, int64_t begin, int64_t end);
  void (*box_iou_loss_backward)(
      const BoxPairs&,
      const float* grad_out,
      bool shared_grad,
      void* grad_pred,
      int64_t begin,
      int64_t end);
  void (*focal_loss)(
      const FocalRows&, float* loss, float* sums, int64_t begin, int64_t end);
  void (*focal_loss_backward)(
      const FocalRows&,
      const float* grad_out,
      bool shared_grad,
      void* grad_logits,
      int64_t begin,
      int64_t end);
};

DLKERNELS_DECLARE_CPU_KERNELS(BoxesKernels, boxes_kernels)

}  // namespace dlkernels
