#include "kernels/pyramid_pool.h"

#include "../include/tensor.h"

namespace dlkernels {
namespace {

PyramidPoolArgs args_of(const Tensor& x, MemoryFormat format) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
      "x must have shape [N, C, H, W] with at least one channel and pixel");
  return {
      scalar_type_of(x, "x"),
      format == MemoryFormat::ChannelsLast,
      x.size(0),
      x.size(1),
      x.size(2),
      x.size(3),
      x.const_data_ptr(),
      nullptr,
      nullptr};
}

// Each thread has scratch memory of its own and some of the items.
template <typename Kernel>
void run(
    const PyramidPoolArgs& args,
    const Tensor& like,
    int64_t floats,
    const Kernel& kernel) {
  const int64_t group = pyramid_pool_kernels().group;
  const int64_t items = args.samples * ceil_div(args.channels, group);
  const int64_t strips =
      std::min<int64_t>(items, torch::stable::get_num_threads());
  Tensor memory = empty_float(like, {strips, floats});
  float* scratch = memory.mutable_data_ptr<float>();
  parallel_for(
      strips,
      items * group * args.area() / std::max<int64_t>(1, strips),
      [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip) {
          kernel(
              args,
              scratch + strip * floats,
              strip * items / strips,
              (strip + 1) * items / strips);
        }
      });
}

Tensor pyramid_pool(const Tensor& x_) {
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  PyramidPoolArgs args = args_of(x, format);
  const std::array<int64_t, 4> sizes{
      args.samples, kPoolBlocks * args.channels, args.height, args.width};
  Tensor out = torch::stable::empty(
      sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
  args.result = out.mutable_data_ptr();
  const PyramidPoolKernels& kernels = pyramid_pool_kernels();
  run(args, x, kernels.forward_floats(args), kernels.forward);
  return out;
}

Tensor pyramid_pool_backward(const Tensor& grad_out_, const Tensor& x_) {
  const MemoryFormat format = memory_format_of(x_);
  const Tensor x = in_format(x_, format);
  PyramidPoolArgs args = args_of(x, format);
  STD_TORCH_CHECK(
      grad_out_.dim() == 4 && grad_out_.size(0) == args.samples &&
          grad_out_.size(1) == kPoolBlocks * args.channels &&
          grad_out_.size(2) == args.height && grad_out_.size(3) == args.width &&
          grad_out_.scalar_type() == x.scalar_type(),
      "grad_out must have the shape and dtype of the output");
  const Tensor grad_out = in_format(grad_out_, format);
  Tensor grad_x = empty_maps(x, format);
  args.grad_out = grad_out.const_data_ptr();
  args.result = grad_x.mutable_data_ptr();
  const PyramidPoolKernels& kernels = pyramid_pool_kernels();
  run(args, x, kernels.backward_floats(args), kernels.backward);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("pyramid_pool", TORCH_BOX(&pyramid_pool));
  m.impl("pyramid_pool_backward", TORCH_BOX(&pyramid_pool_backward));
}

}  // namespace dlkernels
