// Runs the CUDA kernels of squeeze_excite on the CPU: arguments and inputs from
// standard input, results to standard output, as test_squeeze_excite.py orders
// them. Every order of blocks and threads must give the same bits.

#include "../../../csrc/cuda/kernels/squeeze_excite.cu"

#include <string>
#include <vector>

using cuda_on_cpu::Memory;
using cuda_on_cpu::Order;
using namespace dlkernels;

namespace {

struct Header {
  int64_t dtype, channels_last, samples, channels, area, squeezed;
  int64_t activation, gate, relu, biases, shortcut;
};

std::unique_ptr<Memory> read_input(int64_t bytes) {
  auto memory = std::make_unique<Memory>(bytes);
  if (std::fread(memory->data(), 1, bytes, stdin) !=
      static_cast<size_t>(bytes)) {
    cuda_on_cpu::fail("the input is too short");
  }
  return memory;
}

struct Output {
  std::unique_ptr<Memory> memory;
  int64_t bytes;
};

class Outputs {
 public:
  template <typename T = void>
  T* make(int64_t bytes) {
    outputs_.push_back({std::make_unique<Memory>(bytes), bytes});
    return static_cast<T*>(outputs_.back().memory->data());
  }

  std::string bytes() const {
    std::string all;
    for (const Output& output : outputs_) {
      all.append(static_cast<const char*>(output.memory->data()), output.bytes);
    }
    return all;
  }

 private:
  std::vector<Output> outputs_;
};

}  // namespace

int main() {
  Header h;
  if (std::fread(&h, sizeof(h), 1, stdin) != 1) {
    cuda_on_cpu::fail("no header");
  }
  const cuda::Maps maps{
      static_cast<ScalarType>(h.dtype),
      h.channels_last != 0,
      h.samples,
      h.channels,
      h.area};
  const int64_t item = maps.dtype == ScalarType::Float ? 4 : 2;
  const int64_t map_bytes = h.samples * h.channels * h.area * item;
  const int64_t weight_bytes = h.channels * h.squeezed * item;
  const auto x = read_input(map_bytes);
  const auto reduce_weight = read_input(weight_bytes);
  const auto reduce_bias = read_input(h.biases * h.squeezed * item);
  const auto expand_weight = read_input(weight_bytes);
  const auto expand_bias = read_input(h.biases * h.channels * item);
  const auto shortcut = read_input(h.shortcut * map_bytes);
  const auto grad_out = read_input(map_bytes);
  const auto optional = [](bool given, const Memory& memory) {
    return given ? memory.data() : nullptr;
  };

  std::string first;
  for (const Order order : cuda_on_cpu::kOrders) {
    cuda_on_cpu::order = order;
    Outputs results;
    Outputs workspace;
    const int64_t pooled_bytes = h.samples * h.channels * sizeof(float);
    const int64_t hidden_bytes = h.samples * h.squeezed * sizeof(float);
    const cuda::SqueezeExcite forward{
        maps,
        h.squeezed,
        static_cast<Activation>(h.activation),
        static_cast<Gate>(h.gate),
        h.relu != 0,
        x->data(),
        reduce_weight->data(),
        optional(h.biases, *reduce_bias),
        expand_weight->data(),
        optional(h.biases, *expand_bias),
        optional(h.shortcut, *shortcut),
        workspace.make<float>(cuda::splits_of(maps) * pooled_bytes),
        results.make(map_bytes),
        results.make<float>(pooled_bytes),
        results.make<float>(hidden_bytes),
        results.make<float>(pooled_bytes)};
    cuda::squeeze_excite(forward, nullptr);
    cuda::squeeze_excite_backward(
        cuda::SqueezeExciteBackward{
            maps,
            h.squeezed,
            forward.activation,
            forward.gate,
            grad_out->data(),
            forward.x,
            forward.reduce_weight,
            forward.expand_weight,
            forward.relu ? forward.out : nullptr,
            forward.pooled,
            forward.hidden,
            forward.scale,
            workspace.make<float>(cuda::splits_of(maps) * pooled_bytes),
            workspace.make<float>(pooled_bytes),
            workspace.make<float>(hidden_bytes),
            workspace.make<float>(pooled_bytes),
            results.make(map_bytes),
            results.make(weight_bytes),
            results.make(h.squeezed * item),
            results.make(weight_bytes),
            results.make(h.channels * item),
            h.shortcut ? results.make(map_bytes) : nullptr},
        nullptr);
    if (first.empty()) {
      first = results.bytes();
    } else if (first != results.bytes()) {
      cuda_on_cpu::fail("results depend on the order of blocks and threads");
    }
  }
  std::fwrite(first.data(), 1, first.size(), stdout);
}
