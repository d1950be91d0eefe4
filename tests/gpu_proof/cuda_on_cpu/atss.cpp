// Runs the CUDA kernels of ATSS assignment on the CPU: arguments and inputs
// from standard input, results to standard output, as test_atss.py orders them.
// Every order of blocks and threads must give the same bits.

#include "../../../csrc/cuda/kernels/atss.cu"

#include <string>

using cuda_on_cpu::Memory;
using cuda_on_cpu::Order;
using namespace dlkernels;

namespace {

struct Header {
  int64_t grid, images, max_boxes, k, num_levels, per_cell, count, own_anchors;
  int64_t valid, num_ignore;
  double offset, ignore_iof;
  int64_t levels[atss::kMaxLevels][3];  // height, width, stride
};

std::unique_ptr<Memory> read_input(int64_t bytes) {
  auto memory = std::make_unique<Memory>(bytes);
  if (std::fread(memory->data(), 1, bytes, stdin) !=
      static_cast<size_t>(bytes)) {
    cuda_on_cpu::fail("the input is too short");
  }
  return memory;
}

}  // namespace

int main() {
  Header h;
  if (std::fread(&h, sizeof(h), 1, stdin) != 1) {
    cuda_on_cpu::fail("no header");
  }
  constexpr int64_t kBox = 4 * sizeof(float);
  const int64_t items = h.images * h.count;
  const auto anchor_boxes = read_input(
      kBox * (h.grid ? h.num_levels * h.per_cell
                     : h.count * (h.own_anchors ? h.images : 1)));
  const auto boxes = read_input(kBox * h.images * h.max_boxes);
  const auto counts = read_input(h.images * sizeof(int64_t));
  const auto valid = read_input(h.valid * items);
  const auto ignore = read_input(kBox * h.images * h.num_ignore);

  atss::Anchors anchors{};
  anchors.boxes = static_cast<float*>(anchor_boxes->data());
  anchors.image_stride = h.own_anchors ? 4 * h.count : 0;
  anchors.per_cell = h.per_cell;
  anchors.offset = static_cast<float>(h.offset);
  anchors.num_levels = h.num_levels;
  int64_t slots = 0;
  for (int64_t l = 0; l < h.num_levels; ++l) {
    const auto [height, width, stride] = h.levels[l];
    const int64_t count = height * width * h.per_cell;
    anchors.levels[l] = {
        anchors.count, count, height, width, static_cast<float>(stride)};
    anchors.count += count;
    slots += std::min(h.k, count);
  }

  std::string first;
  for (const Order order : cuda_on_cpu::kOrders) {
    cuda_on_cpu::order = order;
    const Memory exclusions(items);
    const Memory claims(items * sizeof(uint64_t));
    const Memory iou(items * sizeof(float));
    const Memory candidates(
        h.images * h.max_boxes * slots * sizeof(cuda::AtssCandidate));
    std::memset(claims.data(), 0, items * sizeof(uint64_t));
    const bool excludes = h.valid || h.num_ignore;
    cuda::atss_assign(
        cuda::AtssAssign{
            atss::Assign{
                anchors,
                h.grid != 0,
                h.images,
                h.max_boxes,
                static_cast<float*>(boxes->data()),
                static_cast<int64_t*>(counts->data()),
                h.k,
                slots,
                excludes ? static_cast<atss::Exclusion*>(exclusions.data())
                         : nullptr,
                static_cast<uint64_t*>(claims.data())},
            atss::Exclude{
                h.valid ? static_cast<bool*>(valid->data()) : nullptr,
                h.count,
                h.num_ignore ? static_cast<float*>(ignore->data()) : nullptr,
                h.num_ignore,
                static_cast<float>(h.ignore_iof)},
            static_cast<cuda::AtssCandidate*>(candidates.data()),
            static_cast<int64_t*>(claims.data()),
            static_cast<float*>(iou.data())},
        nullptr);
    std::string results(
        static_cast<const char*>(claims.data()), items * sizeof(int64_t));
    results.append(static_cast<const char*>(iou.data()), items * sizeof(float));
    if (first.empty()) {
      first = results;
    } else if (first != results) {
      cuda_on_cpu::fail("results depend on the order of blocks and threads");
    }
  }
  std::fwrite(first.data(), 1, first.size(), stdout);
}
