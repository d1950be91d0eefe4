#include "asff.h"

#include <type_traits>

#include "../reduce.h"
#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// ---- resizing -------------------------------------------------------------

// What an enlarged row (or column) reads at a position: a mixture of two
// neighbouring cells.
struct Source {
  int64_t first;
  int64_t second;
  float share;  // of the second
};

DLKERNELS_INLINE Source
source_of(int64_t position, int64_t factor, int64_t size, bool bilinear) {
  const int64_t cell = position / factor;
  if (!bilinear || factor == 1) {
    return {cell, cell, 0.0f};
  }
  const float scale = 1.0f / static_cast<float>(factor);
  const float centre = (static_cast<float>(position) + 0.5f) * scale - 0.5f;
  const float inside = centre < 0.0f ? 0.0f : centre;
  const int64_t first = static_cast<int64_t>(inside);
  const int64_t second = first + 1 < size ? first + 1 : first;
  return {first, second, inside - static_cast<float>(first)};
}

// How much of a position's value the enlarged row takes from the cell.
DLKERNELS_INLINE float share_of(const Source& source, int64_t cell) {
  return (source.first == cell ? 1.0f - source.share : 0.0f) +
         (source.second == cell ? source.share : 0.0f);
}

// The positions whose values depend on a cell.
struct Reach {
  int64_t begin;
  int64_t end;
};

DLKERNELS_INLINE Reach
reach_of(int64_t cell, int64_t factor, int64_t size, bool bilinear) {
  const int64_t margin = bilinear && factor > 1 ? factor / 2 : 0;
  const int64_t begin = cell * factor - margin;
  const int64_t end = (cell + 1) * factor + margin;
  return {begin > 0 ? begin : 0, end < size ? end : size};
}

// ---- softmax --------------------------------------------------------------

DLKERNELS_INLINE int64_t count_of(Full) {
  return kVecSize;
}

DLKERNELS_INLINE int64_t count_of(int64_t lanes) {
  return lanes;
}

// Where the logit of a level and pixel stands, and the step to the next pixel.
struct LogitsRow {
  int64_t offset;
  int64_t level;
  int64_t pixel;

  LogitsRow(const Logits& logits, int64_t row) {
    const int64_t area = logits.height * logits.width;
    const int64_t sample = row / logits.height;
    const int64_t first = row % logits.height * logits.width;
    level = logits.channels_last ? 1 : area;
    pixel = logits.channels_last ? logits.num_levels : 1;
    offset = sample * logits.num_levels * area + first * pixel;
  }
};

template <typename T, typename Lanes>
DLKERNELS_INLINE Vec load_strided(const T* from, int64_t stride, Lanes lanes) {
  if (stride == 1) {
    return load(from, lanes);
  }
  Vec value{};
  for (int64_t i = 0; i < count_of(lanes); ++i) {
    value[i] = load_one(from + i * stride);
  }
  return value;
}

template <typename T, typename Lanes>
DLKERNELS_INLINE void store_strided(
    T* to, int64_t stride, Vec value, Lanes lanes) {
  if (stride == 1) {
    store(to, value, lanes);
    return;
  }
  for (int64_t i = 0; i < count_of(lanes); ++i) {
    store_one(to + i * stride, value[i]);
  }
}

void softmax(
    const Logits& logits,
    const void* values,
    float* weights,
    int64_t begin,
    int64_t end) {
  const int64_t area = logits.height * logits.width;
  const int64_t levels = logits.num_levels;
  dispatch(logits.dtype, [&](auto* tag) {
    const auto* from = static_cast<decltype(tag)>(const_cast<void*>(values));
    for (int64_t row = begin; row < end; ++row) {
      const LogitsRow at(logits, row);
      const int64_t sample = row / logits.height;
      float* to =
          weights + sample * levels * area + row % logits.height * logits.width;
      for_each_vec(logits.width, [&](int64_t x, auto lanes) {
        Vec z[kMaxLevels];
        for (int64_t l = 0; l < levels; ++l) {
          z[l] = load_strided(
              from + at.offset + l * at.level + x * at.pixel, at.pixel, lanes);
        }
        Vec largest = z[0];
        for (int64_t l = 1; l < levels; ++l) {
          largest = maximum(largest, z[l]);
        }
        Vec total{};
        for (int64_t l = 0; l < levels; ++l) {
          z[l] = exp(z[l] - largest);
          total += z[l];
        }
        for (int64_t l = 0; l < levels; ++l) {
          store(to + l * area + x, z[l] / total, lanes);
        }
      });
    }
  });
}

void softmax_backward(
    const Logits& logits,
    const float* weights,
    const float* dots,
    int64_t parts,
    void* grad_logits,
    int64_t begin,
    int64_t end) {
  const int64_t area = logits.height * logits.width;
  const int64_t levels = logits.num_levels;
  dispatch(logits.dtype, [&](auto* tag) {
    auto* to = static_cast<decltype(tag)>(grad_logits);
    for (int64_t row = begin; row < end; ++row) {
      const LogitsRow at(logits, row);
      const int64_t sample = row / logits.height;
      const int64_t first = row % logits.height * logits.width;
      const float* weight = weights + sample * levels * area + first;
      const float* dot = dots + sample * parts * levels * area + first;
      for_each_vec(logits.width, [&](int64_t x, auto lanes) {
        Vec grad[kMaxLevels];
        Vec mean{};
        for (int64_t l = 0; l < levels; ++l) {
          Vec total{};
          for (int64_t part = 0; part < parts; ++part) {
            total += load(dot + (part * levels + l) * area + x, lanes);
          }
          grad[l] = total;
          mean += load(weight + l * area + x, lanes) * total;
        }
        for (int64_t l = 0; l < levels; ++l) {
          const Vec value =
              load(weight + l * area + x, lanes) * (grad[l] - mean);
          store_strided(
              to + at.offset + l * at.level + x * at.pixel,
              at.pixel,
              value,
              lanes);
        }
      });
    }
  });
}

// ---- contiguous maps: rows are enlarged by permuting lanes ------------------

// Enlarges and shrinks rows of one level. Rows are read and written by whole
// vectors, so that there must be room before and behind them.
class RowResizer {
 public:
  RowResizer() = default;

  RowResizer(int64_t factor, bool bilinear)
      : shift_(__builtin_ctzll(factor)), bilinear_(bilinear && factor > 1) {
    const float scale = 1.0f / static_cast<float>(factor);
    for (int32_t i = 0; i < kPeriod; ++i) {
      const int64_t phase = i % factor;
      const float centre = (static_cast<float>(phase) + 0.5f) * scale - 0.5f;
      const bool left = centre < 0.0f;
      cell_[i] = i >> shift_;
      // Bilinear rows are read from one cell further left.
      first_[i] = cell_[i] + (left ? 0 : 1);
      second_[i] = first_[i] + 1;
      share_[i] = left ? centre + 1.0f : centre;
      to_own_[i] = left ? share_[i] : 1.0f - share_[i];
      to_left_[i] = left ? 1.0f - share_[i] : 0.0f;
      to_right_[i] = left ? 0.0f : share_[i];
    }
  }

  // wide[x] for x in [0, width), from a row of width / factor cells; nearest,
  // as many copies of that row.
  void enlarge(float* row, int64_t width, int64_t copies, float* wide) const {
    if (!bilinear_) {
      const IntVec cell = cells();
      for (int64_t copy = 0; copy < copies; ++copy) {
        for (int64_t x = 0; x < width; x += kVecSize) {
          store(
              wide + copy * width + x,
              permute(load(row + (x >> shift_)), cell));
        }
      }
      return;
    }
    const int64_t cells = width >> shift_;
    // As in torch, the first positions read the second cell with weight zero,
    // which shows where that is not finite.
    row[-1] = row[0] + 0.0f * row[cells > 1 ? 1 : 0];
    row[cells] = row[cells - 1];
    for (int64_t x = 0; x < width; x += kVecSize) {
      const int64_t phase = phase_of(x);
      const Vec value = load(row + (x >> shift_) - 1);
      const Vec share = load(share_ + phase);
      const Vec first = permute(value, indices(first_ + phase));
      const Vec second = permute(value, indices(second_ + phase));
      store(wide + x, (1.0f - share) * first + share * second);
    }
  }

  // Which cells the positions of a vector read, counted from that of the first.
  IntVec cells() const {
    return indices(cell_);
  }

  // The adjoint of enlarge; `columns` are three rows of scratch memory.
  template <typename T>
  void shrink(
      const float* wide, int64_t width, float* const* columns, T* row) const {
    const int64_t cells = width >> shift_;
    float* own = columns[0];
    if (!bilinear_) {
      sum_cells(wide, width, own);
      for_each_vec(cells, [&](int64_t i, auto lanes) {
        store(row + i, load(own + i, lanes), lanes);
      });
      return;
    }
    float* left = columns[1];
    float* right = columns[2];
    sum_shares(wide, width, to_own_, own);
    sum_shares(wide, width, to_left_, left);
    sum_shares(wide, width, to_right_, right);
    // What would leave the row stays in the cell at its edge.
    right[-1] = left[0];
    left[cells] = right[cells - 1];
    for_each_vec(cells, [&](int64_t i, auto lanes) {
      const Vec from_neighbours =
          load(right + i - 1, lanes) + load(left + i + 1, lanes);
      store(row + i, load(own + i, lanes) + from_neighbours, lanes);
    });
  }

 private:
  static constexpr int64_t kPeriod = kVecSize > 8 ? kVecSize : 8;

  static IntVec indices(const int32_t* from) {
    IntVec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }

  int64_t phase_of(int64_t x) const {
    return x & ((int64_t{1} << shift_) - 1);
  }

  // sums[cell] = the sum of the cell's positions
  void sum_cells(const float* wide, int64_t width, float* sums) const {
    for (int64_t halving = 0; halving < shift_; ++halving) {
      width /= 2;
      for (int64_t x = 0; x < width; x += kVecSize) {
        const float* pairs = wide + 2 * x;
        store(sums + x, pair_sums(load(pairs), load(pairs + kVecSize)));
      }
      wide = sums;
    }
  }

  void sum_shares(
      const float* wide,
      int64_t width,
      const float* shares,
      float* sums) const {
    for (int64_t x = 0; x < width; x += kVecSize) {
      store(sums + x, load(wide + x) * load(shares + phase_of(x)));
    }
    sum_cells(sums, width, sums);
  }

  // Tables by position, which repeat after a whole number of cells.
  int64_t shift_;
  bool bilinear_;
  int32_t cell_[kPeriod];
  int32_t first_[kPeriod];
  int32_t second_[kPeriod];
  float share_[kPeriod];
  float to_own_[kPeriod];
  float to_left_[kPeriod];
  float to_right_[kPeriod];
};

// The values themselves where they are floats, else a copy of them in `room`.
DLKERNELS_INLINE const float* as_floats(const float* values, int64_t, float*) {
  return values;
}

template <typename T>
DLKERNELS_INLINE const float* as_floats(
    const T* values, int64_t size, float* room) {
  for_each_vec(size, [&](int64_t i, auto lanes) {
    store(room + i, load(values + i, lanes), lanes);
  });
  return room;
}

// A number known at compile time.
template <int64_t n>
struct Count {
  static constexpr int64_t value = n;
  constexpr operator int64_t() const {
    return n;
  }
};

// Works on planes [height, width] of the output, one or kPlanes at a time.
template <typename T>
class Planes {
 public:
  Planes(const Pyramid& pyramid, const float* weights, float* memory)
      : pyramid_(pyramid),
        weights_(weights),
        area_(pyramid.height * pyramid.width),
        layout_(scratch_of(pyramid)),
        memory_(memory) {
    for (int64_t l = 0; l < pyramid.num_levels; ++l) {
      resizers_[l] = RowResizer(pyramid.levels[l].factor, pyramid.bilinear);
    }
  }

  // Calls body(plane, Count<planes>{}) for [begin, end), where planes that are
  // worked on together belong to one sample.
  template <typename Body>
  void for_each_group(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t plane = begin; plane < end;) {
      const int64_t next = (plane / pyramid_.channels + 1) * pyramid_.channels;
      if (plane + kPlanes <= (next < end ? next : end)) {
        body(plane, Count<kPlanes>{});
        plane += kPlanes;
      } else {
        body(plane, Count<1>{});
        plane += 1;
      }
    }
  }

  template <int64_t kLevels, int64_t kCount>
  void fuse(Count<kLevels>, Count<kCount>, int64_t plane, T* out) const {
    const float* weights = weights_of(plane);
    for_each_strip([&](int64_t row, int64_t rows) {
      const int64_t first = row * pyramid_.width;
      const float* values[kLevels][kCount];
      for (int64_t l = 0; l < kLevels; ++l) {
        for (int64_t p = 0; p < kCount; ++p) {
          values[l][p] = enlarged(l, plane, p, row, rows);
        }
      }
      for_each_vec(rows * pyramid_.width, [&](int64_t i, auto lanes) {
        Vec total[kCount] = {};
        for (int64_t l = 0; l < kLevels; ++l) {
          const Vec weight = load(weights + l * area_ + first + i, lanes);
          for (int64_t p = 0; p < kCount; ++p) {
            total[p] += weight * load(values[l][p] + i, lanes);
          }
        }
        for (int64_t p = 0; p < kCount; ++p) {
          store(out + (plane + p) * area_ + first + i, total[p], lanes);
        }
      });
    });
  }

  // The same, nearest, straight from the levels: a vector of an enlarged row is
  // a vector of the level, permuted. Rows must be a vector wide, and a vector
  // may be read from every cell on.
  template <int64_t kLevels, int64_t kCount>
  void fuse_nearest(
      Count<kLevels>, Count<kCount>, int64_t plane, T* out) const {
    const int64_t width = pyramid_.width;
    IntVec cells[kLevels];
    int64_t shifts[kLevels];
    for (int64_t l = 0; l < kLevels; ++l) {
      cells[l] = resizers_[l].cells();
      shifts[l] = __builtin_ctzll(pyramid_.levels[l].factor);
    }
    for (int64_t y = 0; y < pyramid_.height; ++y) {
      const T* rows[kLevels][kCount];
      for (int64_t l = 0; l < kLevels; ++l) {
        for (int64_t p = 0; p < kCount; ++p) {
          rows[l][p] =
              static_cast<const T*>(pyramid_.levels[l].x) +
              ((plane + p) * height_of(l) + (y >> shifts[l])) * width_of(l);
        }
      }
      const float* weights = weights_of(plane) + y * width;
      T* to = out + plane * area_ + y * width;
      const auto fuse_at = [&](int64_t x) {
        Vec total[kCount] = {};
        for (int64_t l = 0; l < kLevels; ++l) {
          const Vec weight = load(weights + l * area_ + x);
          const int64_t cell = x >> shifts[l];
          for (int64_t p = 0; p < kCount; ++p) {
            total[p] += weight * permute(load(rows[l][p] + cell), cells[l]);
          }
        }
        for (int64_t p = 0; p < kCount; ++p) {
          store(to + p * area_ + x, total[p]);
        }
      };
      for (int64_t x = 0; x + kVecSize < width; x += kVecSize) {
        fuse_at(x);
      }
      // The last vector may overlap the one before; whole cells apart, though.
      fuse_at(width - kVecSize);
    }
  }

  // Writes the planes' gradients and adds to dots [levels, height, width].
  template <int64_t kCount>
  void backward(
      Count<kCount> count,
      int64_t plane,
      const T* grad_out,
      float* dots) const {
    clear_shrunk(kCount);
    for_each_strip([&](int64_t row, int64_t rows) {
      const int64_t first = row * pyramid_.width;
      const int64_t size = rows * pyramid_.width;
      const float* grads[kCount];
      for (int64_t p = 0; p < kCount; ++p) {
        grads[p] = as_floats(
            grad_out + (plane + p) * area_ + first,
            size,
            memory_ + layout_.grad[p]);
      }
      for (int64_t l = 0; l < pyramid_.num_levels; ++l) {
        const float* weight = weights_of(plane) + l * area_ + first;
        float* dot = dots + l * area_ + first;
        const float* values[kCount];
        for (int64_t p = 0; p < kCount; ++p) {
          values[p] = enlarged(l, plane, p, row, rows);
        }
        if (pyramid_.levels[l].factor == 1) {
          T* to[kCount];
          for (int64_t p = 0; p < kCount; ++p) {
            to[p] = grad_of(l, plane + p) + first;
          }
          weigh(count, size, grads, values, weight, dot, to);
        } else {
          float* to[kCount];
          for (int64_t p = 0; p < kCount; ++p) {
            to[p] = memory_ + layout_.wide[l][p];
          }
          weigh(count, size, grads, values, weight, dot, to);
          for (int64_t p = 0; p < kCount; ++p) {
            shrink_rows(l, p, row, rows);
          }
        }
      }
    });
    for (int64_t l = 0; l < pyramid_.num_levels; ++l) {
      for (int64_t p = 0; p < kCount; ++p) {
        shrink_columns(l, plane, p);
      }
    }
  }

 private:
  int64_t height_of(int64_t l) const {
    return pyramid_.height / pyramid_.levels[l].factor;
  }

  int64_t width_of(int64_t l) const {
    return pyramid_.width / pyramid_.levels[l].factor;
  }

  const float* weights_of(int64_t plane) const {
    return weights_ + plane / pyramid_.channels * pyramid_.num_levels * area_;
  }

  T* grad_of(int64_t l, int64_t plane) const {
    return static_cast<T*>(pyramid_.levels[l].grad) +
           plane * height_of(l) * width_of(l);
  }

  float* narrow_row(int64_t row) const {
    return memory_ + layout_.narrow + row * layout_.narrow_stride;
  }

  float* shrunk_row(int64_t l, int64_t p, int64_t row) const {
    return memory_ + layout_.shrunk[l][p] + row * layout_.shrunk_stride;
  }

  template <typename Body>
  void for_each_strip(const Body& body) const {
    const int64_t height = pyramid_.height;
    for (int64_t row = 0; row < height; row += layout_.strip_rows) {
      const int64_t rest = height - row;
      body(row, rest < layout_.strip_rows ? rest : layout_.strip_rows);
    }
  }

  // dot += grad * value, summed over the planes, and to = grad * weight.
  template <int64_t kCount, typename To>
  void weigh(
      Count<kCount>,
      int64_t size,
      const float* const* grads,
      const float* const* values,
      const float* weight,
      float* dot,
      To* const* to) const {
    for_each_vec(size, [&](int64_t i, auto lanes) {
      const Vec factor = load(weight + i, lanes);
      Vec products[kCount];
      for (int64_t p = 0; p < kCount; ++p) {
        const Vec grad = load(grads[p] + i, lanes);
        products[p] = grad * load(values[p] + i, lanes);
        store(to[p] + i, grad * factor, lanes);
      }
      for (int64_t half = kCount / 2; half > 0; half /= 2) {
        for (int64_t p = 0; p < half; ++p) {
          products[p] += products[p + half];
        }
      }
      store(dot + i, load(dot + i, lanes) + products[0], lanes);
    });
  }

  // Rows of a level in the size of the output, of plane `plane + p`.
  const float* enlarged(
      int64_t l, int64_t plane, int64_t p, int64_t first, int64_t rows) const {
    const auto& level = pyramid_.levels[l];
    const int64_t width = width_of(l);
    const T* values =
        static_cast<const T*>(level.x) + (plane + p) * height_of(l) * width;
    float* wide = memory_ + layout_.wide[l][p];
    if (level.factor == 1) {
      return as_floats(values + first * width, rows * width, wide);
    }
    // All rows of the strip are read before the first is enlarged: a vector
    // that spans two fresh stores would wait for both.
    const int64_t copies = pyramid_.bilinear ? 1 : level.factor;
    for (int64_t row = 0; row < rows; row += copies) {
      read_row(l, values, first + row, narrow_row(row));
    }
    for (int64_t row = 0; row < rows; row += copies) {
      resizers_[l].enlarge(
          narrow_row(row), pyramid_.width, copies, wide + row * pyramid_.width);
    }
    return wide;
  }

  // What a row of the output reads of a level's plane, not yet enlarged.
  void read_row(int64_t l, const T* values, int64_t row, float* narrow) const {
    const bool bilinear = pyramid_.bilinear;
    const Source source =
        source_of(row, pyramid_.levels[l].factor, height_of(l), bilinear);
    const T* upper = values + source.first * width_of(l);
    const T* lower = values + source.second * width_of(l);
    for_each_vec(width_of(l), [&](int64_t x, auto lanes) {
      Vec value = load(upper + x, lanes);
      if (bilinear) {
        value = (1.0f - source.share) * value +
                source.share * load(lower + x, lanes);
      }
      store(narrow + x, value, lanes);
    });
  }

  void clear_shrunk(int64_t planes) const {
    for (int64_t l = 0; l < pyramid_.num_levels; ++l) {
      for (int64_t p = 0; p < planes && pyramid_.levels[l].factor > 1; ++p) {
        const int64_t size = height_of(l) * layout_.shrunk_stride;
        __builtin_memset(shrunk_row(l, p, 0), 0, sizeof(float) * size);
      }
    }
  }

  void shrink_rows(int64_t l, int64_t p, int64_t first, int64_t rows) const {
    const int64_t factor = pyramid_.levels[l].factor;
    for (int64_t row = 0; row < rows; ++row) {
      const Source source =
          source_of(first + row, factor, height_of(l), pyramid_.bilinear);
      const float* values = memory_ + layout_.wide[l][p] + row * pyramid_.width;
      add_row(values, 1.0f - source.share, shrunk_row(l, p, source.first));
      if (source.share > 0.0f) {
        add_row(values, source.share, shrunk_row(l, p, source.second));
      }
    }
  }

  void add_row(const float* values, float factor, float* to) const {
    for (int64_t x = 0; x < pyramid_.width; x += kVecSize) {
      store(to + x, load(to + x) + factor * load(values + x));
    }
  }

  void shrink_columns(int64_t l, int64_t plane, int64_t p) const {
    if (pyramid_.levels[l].factor == 1) {
      return;
    }
    float* const columns[] = {
        memory_ + layout_.columns[0],
        memory_ + layout_.columns[1],
        memory_ + layout_.columns[2]};
    for (int64_t row = 0; row < height_of(l); ++row) {
      resizers_[l].shrink(
          shrunk_row(l, p, row),
          pyramid_.width,
          columns,
          grad_of(l, plane + p) + row * width_of(l));
    }
  }

  const Pyramid& pyramid_;
  const float* weights_;
  int64_t area_;
  Scratch layout_;
  float* memory_;
  RowResizer resizers_[kMaxLevels];
};

// Calls body(Count<n>{}) for the n levels of a pyramid.
template <typename Body>
DLKERNELS_INLINE void with_levels(int64_t count, const Body& body) {
  switch (count) {
    case 2:
      return body(Count<2>{});
    case 3:
      return body(Count<3>{});
    case 4:
      return body(Count<4>{});
    default:
      return body(Count<5>{});
  }
}

void fuse_contiguous(
    const Pyramid& pyramid,
    const float* weights,
    void* out,
    float* scratch,
    int64_t begin,
    int64_t end) {
  dispatch(pyramid.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Planes<T> planes(pyramid, weights, scratch);
    const bool nearest = !pyramid.bilinear && pyramid.width >= kVecSize;
    const int64_t cells =
        pyramid.height * pyramid.width / (pyramid.coarsest * pyramid.coarsest);
    with_levels(pyramid.num_levels, [&](auto levels) {
      planes.for_each_group(begin, end, [&](int64_t plane, auto count) {
        const int64_t cells_behind = (end - plane - count.value) * cells;
        if (nearest && cells_behind >= kVecSize) {
          planes.fuse_nearest(levels, count, plane, static_cast<T*>(out));
        } else {
          planes.fuse(levels, count, plane, static_cast<T*>(out));
        }
      });
    });
  });
}

void fuse_backward_contiguous(
    const Pyramid& pyramid,
    const float* weights,
    const void* grad_out,
    float* dots,
    int64_t parts,
    float* scratch,
    int64_t begin,
    int64_t end) {
  // Channels are summed in blocks, so that rounding errors grow more slowly.
  constexpr int64_t kBlock = 16;
  const int64_t size = pyramid.num_levels * pyramid.height * pyramid.width;
  const int64_t step = (pyramid.channels + parts - 1) / parts;
  float* block_dots = scratch + scratch_of(pyramid).dots;
  dispatch(pyramid.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Planes<T> planes(pyramid, weights, scratch);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / parts * pyramid.channels;
      const int64_t first = item % parts * step;
      const int64_t last =
          first + step < pyramid.channels ? first + step : pyramid.channels;
      float* totals = dots + item * size;
      __builtin_memset(totals, 0, sizeof(float) * size);
      for (int64_t c = first; c < last; c += kBlock) {
        const int64_t stop = c + kBlock < last ? c + kBlock : last;
        __builtin_memset(block_dots, 0, sizeof(float) * size);
        planes.for_each_group(
            sample + c, sample + stop, [&](int64_t plane, auto count) {
              planes.backward(
                  count, plane, static_cast<const T*>(grad_out), block_dots);
            });
        for_each_vec(size, [&](int64_t i, auto lanes) {
          const Vec total =
              load(totals + i, lanes) + load(block_dots + i, lanes);
          store(totals + i, total, lanes);
        });
      }
    }
  });
}

// ---- channels_last: weighted sums of pixels, channel by channel ------------

// A pixel's channels and the weight that they enter a sum with.
template <typename T>
struct Tap {
  const T* channels;
  float weight;
};

template <typename T, typename Lanes>
DLKERNELS_INLINE Vec
mix(const Tap<T>* taps, int64_t count, int64_t c, Lanes lanes) {
  Vec total{};
  for (int64_t t = 0; t < count; ++t) {
    total += taps[t].weight * load(taps[t].channels + c, lanes);
  }
  return total;
}

// `count` may be a Count.
template <typename T, typename N>
void mix_channels(const Tap<T>* taps, N count, int64_t channels, T* out) {
  constexpr int64_t kVecs = 4;
  int64_t c = 0;
  for (; c + kVecs * kVecSize <= channels; c += kVecs * kVecSize) {
    Vec total[kVecs] = {};
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t v = 0; v < kVecs; ++v) {
        total[v] += taps[t].weight * load(taps[t].channels + c + v * kVecSize);
      }
    }
    for (int64_t v = 0; v < kVecs; ++v) {
      store(out + c + v * kVecSize, total[v]);
    }
  }
  for_each_vec(channels - c, [&](int64_t i, auto lanes) {
    store(out + c + i, mix(taps, count, c + i, lanes), lanes);
  });
}

// Works on one sample [height, width, channels].
template <typename T>
class Pixels {
 public:
  Pixels(const Pyramid& pyramid, int64_t sample, const float* weights)
      : pyramid_(pyramid),
        sample_(sample),
        area_(pyramid.height * pyramid.width),
        weights_(weights + sample * pyramid.num_levels * area_) {}

  template <int64_t kLevels>
  void fuse_row_nearest(Count<kLevels> levels, int64_t y, T* out) const {
    Tap<T> taps[kLevels];
    for (int64_t x = 0; x < pyramid_.width; ++x) {
      for (int64_t l = 0; l < kLevels; ++l) {
        taps[l] = tap_of(l, y, x, weight_of(l, y, x));
      }
      mix_channels(taps, levels, pyramid_.channels, out + offset_of(y, x));
    }
  }

  void fuse_row(int64_t y, T* out) const {
    Tap<T> taps[kMaxTaps * kMaxLevels];
    for (int64_t x = 0; x < pyramid_.width; ++x) {
      int64_t count = 0;
      for (int64_t l = 0; l < pyramid_.num_levels; ++l) {
        count += taps_of(l, y, x, weight_of(l, y, x), taps + count);
      }
      mix_channels(taps, count, pyramid_.channels, out + offset_of(y, x));
    }
  }

  // The dots of a pixel, and the gradients of levels in the output's size.
  void backward_row(int64_t y, const T* grad_out, float* dots) const {
    Tap<T> taps[kMaxTaps];
    for (int64_t x = 0; x < pyramid_.width; ++x) {
      const T* grad = grad_out + offset_of(y, x);
      for (int64_t l = 0; l < pyramid_.num_levels; ++l) {
        const int64_t count = taps_of(l, y, x, 1.0f, taps);
        dots[index_of(l, y, x)] =
            sum_of(pyramid_.channels, [&](int64_t c, auto lanes) {
              return load(grad + c, lanes) * mix(taps, count, c, lanes);
            });
        if (pyramid_.levels[l].factor == 1) {
          const Tap<T> tap = {grad, weight_of(l, y, x)};
          T* to = static_cast<T*>(pyramid_.levels[l].grad) + offset_of(y, x);
          mix_channels(&tap, Count<1>{}, pyramid_.channels, to);
        }
      }
    }
  }

  // The gradients of smaller levels, at the cells that these rows cover.
  void backward_cells(int64_t begin, int64_t end, const T* grad_out) const {
    for (int64_t l = 0; l < pyramid_.num_levels; ++l) {
      const int64_t factor = pyramid_.levels[l].factor;
      if (factor == 1) {
        continue;
      }
      for (int64_t row = begin / factor; row < end / factor; ++row) {
        for (int64_t column = 0; column < pyramid_.width / factor; ++column) {
          backward_cell(l, row, column, grad_out);
        }
      }
    }
  }

 private:
  // Bilinear, a position reads two by two cells, and up to twice the largest
  // factor in both directions read a cell.
  static constexpr int64_t kMaxTaps = 4;
  static constexpr int64_t kMaxReach = 16 * 16;

  int64_t index_of(int64_t l, int64_t y, int64_t x) const {
    return l * area_ + y * pyramid_.width + x;
  }

  float weight_of(int64_t l, int64_t y, int64_t x) const {
    return weights_[index_of(l, y, x)];
  }

  int64_t offset_of(int64_t y, int64_t x) const {
    return (sample_ * area_ + y * pyramid_.width + x) * pyramid_.channels;
  }

  int64_t cell_offset(int64_t l, int64_t row, int64_t column) const {
    const int64_t factor = pyramid_.levels[l].factor;
    const int64_t cells = area_ / (factor * factor);
    const int64_t cell = row * (pyramid_.width / factor) + column;
    return (sample_ * cells + cell) * pyramid_.channels;
  }

  // The one cell that a position reads of a level in full size, or nearest.
  Tap<T> tap_of(int64_t l, int64_t y, int64_t x, float weight) const {
    const auto& level = pyramid_.levels[l];
    const auto* values = static_cast<const T*>(level.x);
    return {
        values + cell_offset(l, y / level.factor, x / level.factor), weight};
  }

  // What the level's value at a position of the output consists of.
  int64_t taps_of(
      int64_t l, int64_t y, int64_t x, float weight, Tap<T>* taps) const {
    const auto& level = pyramid_.levels[l];
    const auto* values = static_cast<const T*>(level.x);
    const int64_t factor = level.factor;
    if (factor == 1 || !pyramid_.bilinear) {
      taps[0] = tap_of(l, y, x, weight);
      return 1;
    }
    const Source rows = source_of(y, factor, pyramid_.height / factor, true);
    const Source columns = source_of(x, factor, pyramid_.width / factor, true);
    const auto at = [&](int64_t row, int64_t column) {
      return values + cell_offset(l, row, column);
    };
    const float upper = weight * (1.0f - rows.share);
    const float lower = weight * rows.share;
    const float left = 1.0f - columns.share;
    const float right = columns.share;
    taps[0] = {at(rows.first, columns.first), upper * left};
    taps[1] = {at(rows.first, columns.second), upper * right};
    taps[2] = {at(rows.second, columns.first), lower * left};
    taps[3] = {at(rows.second, columns.second), lower * right};
    return 4;
  }

  void backward_cell(
      int64_t l, int64_t row, int64_t column, const T* grad_out) const {
    const int64_t factor = pyramid_.levels[l].factor;
    const int64_t height = pyramid_.height;
    const int64_t width = pyramid_.width;
    const bool bilinear = pyramid_.bilinear;
    const Reach ys = reach_of(row, factor, height, bilinear);
    const Reach xs = reach_of(column, factor, width, bilinear);
    Tap<T> taps[kMaxReach];
    int64_t count = 0;
    for (int64_t y = ys.begin; y < ys.end; ++y) {
      const Source rows = source_of(y, factor, height / factor, bilinear);
      for (int64_t x = xs.begin; x < xs.end; ++x) {
        const Source columns = source_of(x, factor, width / factor, bilinear);
        const float share = share_of(rows, row) * share_of(columns, column);
        taps[count++] = {
            grad_out + offset_of(y, x), share * weight_of(l, y, x)};
      }
    }
    T* to =
        static_cast<T*>(pyramid_.levels[l].grad) + cell_offset(l, row, column);
    mix_channels(taps, count, pyramid_.channels, to);
  }

  const Pyramid& pyramid_;
  int64_t sample_;
  int64_t area_;
  const float* weights_;
};

void fuse_channels_last(
    const Pyramid& pyramid,
    const float* weights,
    void* out,
    int64_t begin,
    int64_t end) {
  dispatch(pyramid.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t item = begin; item < end; ++item) {
      const Pixels<T> pixels(pyramid, item / pyramid.height, weights);
      const int64_t y = item % pyramid.height;
      if (pyramid.bilinear) {
        pixels.fuse_row(y, static_cast<T*>(out));
      } else {
        with_levels(pyramid.num_levels, [&](auto levels) {
          pixels.fuse_row_nearest(levels, y, static_cast<T*>(out));
        });
      }
    }
  });
}

void fuse_backward_channels_last(
    const Pyramid& pyramid,
    const float* weights,
    const void* grad_out,
    float* dots,
    int64_t begin,
    int64_t end) {
  const int64_t bands = pyramid.height / pyramid.coarsest;
  dispatch(pyramid.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* grad = static_cast<const T*>(grad_out);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / bands;
      const int64_t first = item % bands * pyramid.coarsest;
      const int64_t last = first + pyramid.coarsest;
      const Pixels<T> pixels(pyramid, sample, weights);
      float* sample_dots =
          dots + sample * pyramid.num_levels * pyramid.height * pyramid.width;
      for (int64_t y = first; y < last; ++y) {
        pixels.backward_row(y, grad, sample_dots);
      }
      pixels.backward_cells(first, last, grad);
    }
  });
}

}  // namespace

extern const AsffKernels asff_kernels = {
    softmax,
    softmax_backward,
    fuse_contiguous,
    fuse_channels_last,
    fuse_backward_contiguous,
    fuse_backward_channels_last,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
