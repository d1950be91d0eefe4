#include "boxes.h"

#include "../vec.h"

namespace dlkernels {
namespace DLKERNELS_CPU_CAPABILITY {
namespace {

// ---- vectors ----------------------------------------------------------------

#if defined(__AVX512F__)
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#endif

DLKERNELS_INLINE Vec even(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, EVEN_LANES);
}

DLKERNELS_INLINE Vec odd(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, ODD_LANES);
}

DLKERNELS_INLINE Vec zip_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, LOW_LANES);
}

DLKERNELS_INLINE Vec zip_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, HIGH_LANES);
}

DLKERNELS_INLINE IntVec lane_numbers() {
  IntVec numbers;
  for (int i = 0; i < kVecSize; ++i) {
    numbers[i] = i;
  }
  return numbers;
}

// Zero in the lanes that hold no element.
DLKERNELS_INLINE Vec only(Vec value, Full) {
  return value;
}

DLKERNELS_INLINE Vec only(Vec value, int64_t lanes) {
  return lane_numbers() < static_cast<int32_t>(lanes) ? value : Vec{};
}

DLKERNELS_INLINE Vec relu(Vec value) {
  return value < 0.0f ? Vec{} : value;
}

DLKERNELS_INLINE Vec absolute(Vec value) {
  return as_float(as_bits(value) & 0x7FFFFFFF);
}

// atanh(s) / s for s^2 <= 1/9.
DLKERNELS_INLINE Vec atanh_series(Vec square) {
  Vec p = broadcast(0.14089168f);
  p = p * square + 0.13980301f;
  p = p * square + 0.20012455f;
  p = p * square + 0.33333157f;
  return p * square + 1.0f;
}

// ln x for normal positive x.
DLKERNELS_INLINE Vec log_of(Vec x) {
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)).
  const UIntVec shifted = as_bits(x) - 0x3F3504F3;
  const IntVec n = reinterpret_cast<IntVec>(shifted) >> 23;
  const Vec m = as_float((shifted & 0x007FFFFF) + 0x3F3504F3);
  const Vec s = (m - 1.0f) / (m + 1.0f);
  const Vec result = __builtin_convertvector(n, Vec) * 0.693147181f +
                     2.0f * s * atanh_series(s * s);
  return x == x ? result : x;
}

// x^exponent for 0 <= x <= 1 and exponent >= 0.
DLKERNELS_INLINE Vec power(Vec x, float exponent) {
  if (exponent == 2.0f) {
    return x * x;
  }
  constexpr float kSmallestNormal = 1.17549435e-38f;
  return exp(exponent * log_of(maximum(x, broadcast(kSmallestNormal))));
}

// The angle whose tangent is y / x, in (-pi, pi]; 0 where both are 0.
DLKERNELS_INLINE Vec atan2(Vec y, Vec x) {
  constexpr float kPi = 3.14159265f;
  const Vec height = absolute(y), width = absolute(x);
  const Vec low = minimum(height, width), high = maximum(height, width);
  // Above 22.5 degrees, the angle to the diagonal has the smaller tangent.
  const auto steep = low > 0.414213562f * high;
  const Vec tangent = (steep ? low - high : low) / (steep ? low + high : high);
  const Vec z = tangent * tangent;
  Vec p = broadcast(-0.0603479f);
  p = p * z + 0.1057348f;
  p = p * z - 0.14240083f;
  p = p * z + 0.19998217f;
  p = p * z - 0.33333308f;
  Vec angle = tangent + tangent * z * p;
  angle = steep ? angle + kPi / 4 : angle;
  angle = height > width ? kPi / 2 - angle : angle;
  angle = x < 0.0f ? kPi - angle : angle;
  angle = y < 0.0f ? -angle : angle;
  return high == 0.0f ? Vec{} : angle;
}

// ---- boxes ------------------------------------------------------------------

struct Boxes {
  Vec x1, y1, x2, y2;
};

// Boxes i to i + kVecSize of [count, 4]; lanes beyond the last are zero.
template <typename T>
DLKERNELS_INLINE Boxes load_boxes(const T* boxes, int64_t i, Full) {
  const T* from = boxes + 4 * i;
  const Vec a = load(from), b = load(from + kVecSize);
  const Vec c = load(from + 2 * kVecSize), d = load(from + 3 * kVecSize);
  const Vec x_low = even(a, b), x_high = even(c, d);
  const Vec y_low = odd(a, b), y_high = odd(c, d);
  return {
      even(x_low, x_high),
      even(y_low, y_high),
      odd(x_low, x_high),
      odd(y_low, y_high)};
}

template <typename T>
DLKERNELS_INLINE Boxes load_boxes(const T* boxes, int64_t i, int64_t lanes) {
  T padded[4 * kVecSize] = {};
  __builtin_memcpy(padded, boxes + 4 * i, 4 * lanes * sizeof(T));
  return load_boxes(padded, 0, Full{});
}

template <typename T>
DLKERNELS_INLINE void store_boxes(
    T* boxes, int64_t i, const Boxes& value, Full) {
  T* to = boxes + 4 * i;
  const Vec x_low = zip_low(value.x1, value.x2);
  const Vec x_high = zip_high(value.x1, value.x2);
  const Vec y_low = zip_low(value.y1, value.y2);
  const Vec y_high = zip_high(value.y1, value.y2);
  store(to, zip_low(x_low, y_low));
  store(to + kVecSize, zip_high(x_low, y_low));
  store(to + 2 * kVecSize, zip_low(x_high, y_high));
  store(to + 3 * kVecSize, zip_high(x_high, y_high));
}

template <typename T>
DLKERNELS_INLINE void store_boxes(
    T* boxes, int64_t i, const Boxes& value, int64_t lanes) {
  T padded[4 * kVecSize];
  store_boxes(padded, 0, value, Full{});
  __builtin_memcpy(boxes + 4 * i, padded, 4 * lanes * sizeof(T));
}

// What every loss knows of a pair of boxes: the intersection, the smallest box
// around both (the hull), and the IoU.
struct Pair {
  Vec width, height;                // of pred
  Vec target_width, target_height;  // of target
  Vec inner_width, inner_height;    // of the intersection, 0 where apart
  Vec hull_width, hull_height;
  Vec union_area, denominator, iou;

  DLKERNELS_INLINE Pair of(const Boxes& p, const Boxes& t, float eps) {
    Pair pair;
    pair.width = p.x2 - p.x1;
    pair.height = p.y2 - p.y1;
    pair.target_width = t.x2 - t.x1;
    pair.target_height = t.y2 - t.y1;
    pair.inner_width = relu(minimum(p.x2, t.x2) - maximum(p.x1, t.x1));
    pair.inner_height = relu(minimum(p.y2, t.y2) - maximum(p.y1, t.y1));
    pair.hull_width = maximum(p.x2, t.x2) - minimum(p.x1, t.x1);
    pair.hull_height = maximum(p.y2, t.y2) - minimum(p.y1, t.y1);
    const Vec intersection = pair.inner_width * pair.inner_height;
    pair.union_area = pair.width * pair.height +
                      pair.target_width * pair.target_height - intersection;
    pair.denominator = pair.union_area + eps;
    pair.iou = intersection / pair.denominator;
    return pair;
  }
};

// The distance of the centres over the diagonal of the hull, both squared.
struct Distance {
  Vec x, y;  // of the centres
  Vec diagonal, ratio;

  DLKERNELS_INLINE Distance
  of(const Boxes& p, const Boxes& t, const Pair& pair, float eps) {
    Distance distance;
    distance.x = ((p.x1 - t.x1) + (p.x2 - t.x2)) * 0.5f;
    distance.y = ((p.y1 - t.y1) + (p.y2 - t.y2)) * 0.5f;
    distance.diagonal = pair.hull_width * pair.hull_width +
                        pair.hull_height * pair.hull_height + eps;
    distance.ratio =
        (distance.x * distance.x + distance.y * distance.y) / distance.diagonal;
    return distance;
  }
};

// The difference of the aspect ratios, as an angle, and its weight.
struct Aspect {
  static constexpr float kScale = 0.405284735f;  // 4 / pi^2
  Vec angle, value, alpha;

  DLKERNELS_INLINE Aspect of(const Pair& pair, float eps) {
    Aspect aspect;
    aspect.angle = atan2(pair.width, pair.height) -
                   atan2(pair.target_width, pair.target_height);
    aspect.value = kScale * aspect.angle * aspect.angle;
    aspect.alpha = aspect.value / (1.0f - pair.iou + aspect.value + eps);
    return aspect;
  }
};

template <BoxLoss kKind>
DLKERNELS_INLINE Vec loss_of(const Boxes& p, const Boxes& t, float eps) {
  const Pair pair = Pair::of(p, t, eps);
  Vec loss = 1.0f - pair.iou;
  if constexpr (kKind == BoxLoss::Giou) {
    const Vec hull = pair.hull_width * pair.hull_height;
    loss += (hull - pair.union_area) / (hull + eps);
  }
  if constexpr (kKind == BoxLoss::Diou || kKind == BoxLoss::Ciou) {
    const Distance distance = Distance::of(p, t, pair, eps);
    loss += distance.ratio;
  }
  if constexpr (kKind == BoxLoss::Ciou) {
    const Aspect aspect = Aspect::of(pair, eps);
    loss += aspect.alpha * aspect.value;
  }
  return loss;
}

// The gradient of the loss by what it is a function of.
struct Slopes {
  Vec inner_width{}, inner_height{};
  Vec hull_width{}, hull_height{};
  Vec width{}, height{};
  Vec center_x{}, center_y{};
};

template <BoxLoss kKind>
DLKERNELS_INLINE Slopes
slopes_of(const Boxes& p, const Boxes& t, const Pair& pair, float eps) {
  Vec by_intersection = -(1.0f + pair.iou) / pair.denominator;
  Vec by_area = pair.iou / pair.denominator;
  Slopes slopes;
  if constexpr (kKind == BoxLoss::Giou) {
    const Vec hull = pair.hull_width * pair.hull_height;
    const Vec inverse = 1.0f / (hull + eps);
    const Vec by_hull = (1.0f - (hull - pair.union_area) * inverse) * inverse;
    slopes.hull_width = by_hull * pair.hull_height;
    slopes.hull_height = by_hull * pair.hull_width;
    by_intersection += inverse;
    by_area -= inverse;
  }
  slopes.inner_width = by_intersection * pair.inner_height;
  slopes.inner_height = by_intersection * pair.inner_width;
  slopes.width = by_area * pair.height;
  slopes.height = by_area * pair.width;
  if constexpr (kKind == BoxLoss::Diou || kKind == BoxLoss::Ciou) {
    const Distance distance = Distance::of(p, t, pair, eps);
    const Vec inverse = 1.0f / distance.diagonal;
    slopes.hull_width = -2.0f * distance.ratio * inverse * pair.hull_width;
    slopes.hull_height = -2.0f * distance.ratio * inverse * pair.hull_height;
    slopes.center_x = 2.0f * distance.x * inverse;
    slopes.center_y = 2.0f * distance.y * inverse;
  }
  if constexpr (kKind == BoxLoss::Ciou) {
    const Aspect aspect = Aspect::of(pair, eps);
    const Vec square = pair.width * pair.width + pair.height * pair.height;
    const Vec by_angle =
        2.0f * Aspect::kScale * aspect.alpha * aspect.angle / square;
    const Vec finite = square > 0.0f ? by_angle : Vec{};
    slopes.width += finite * pair.height;
    slopes.height -= finite * pair.width;
  }
  return slopes;
}

// How much of a maximum of a and b moves with a; half where they are equal.
DLKERNELS_INLINE Vec share(Vec a, Vec b) {
  const Vec at_tie = a == b ? broadcast(0.5f) : Vec{};
  return a > b ? broadcast(1.0f) : at_tie;
}

template <BoxLoss kKind>
DLKERNELS_INLINE Boxes grad_of(const Boxes& p, const Boxes& t, float eps) {
  const Pair pair = Pair::of(p, t, eps);
  const Slopes slopes = slopes_of<kKind>(p, t, pair, eps);
  const Vec inner_width = pair.inner_width > 0.0f ? slopes.inner_width : Vec{};
  const Vec inner_height =
      pair.inner_height > 0.0f ? slopes.inner_height : Vec{};
  // A side that does not bound the intersection bounds the hull.
  const Vec x1 = share(p.x1, t.x1), x2 = share(t.x2, p.x2);
  const Vec y1 = share(p.y1, t.y1), y2 = share(t.y2, p.y2);
  const Vec half_x = 0.5f * slopes.center_x, half_y = 0.5f * slopes.center_y;
  return {
      half_x - slopes.width - inner_width * x1 -
          slopes.hull_width * (1.0f - x1),
      half_y - slopes.height - inner_height * y1 -
          slopes.hull_height * (1.0f - y1),
      half_x + slopes.width + inner_width * x2 +
          slopes.hull_width * (1.0f - x2),
      half_y + slopes.height + inner_height * y2 +
          slopes.hull_height * (1.0f - y2)};
}

// Calls body with a type whose `value` is the kind.
template <BoxLoss kKind>
struct Kind {
  static constexpr BoxLoss value = kKind;
};

template <typename Body>
DLKERNELS_INLINE void dispatch_kind(BoxLoss kind, const Body& body) {
  switch (kind) {
    case BoxLoss::Iou:
      return body(Kind<BoxLoss::Iou>{});
    case BoxLoss::Giou:
      return body(Kind<BoxLoss::Giou>{});
    case BoxLoss::Diou:
      return body(Kind<BoxLoss::Diou>{});
    case BoxLoss::Ciou:
      return body(Kind<BoxLoss::Ciou>{});
  }
}

// Calls body(begin, size) for each block of elements.
template <typename Body>
DLKERNELS_INLINE void for_each_block(
    int64_t count, int64_t begin, int64_t end, const Body& body) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLossBlock;
    const int64_t rest = count - first;
    body(block, first, rest < kLossBlock ? rest : kLossBlock);
  }
}

void box_iou_loss(
    const BoxPairs& pairs,
    float* loss,
    float* sums,
    int64_t begin,
    int64_t end) {
  dispatch(pairs.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* pred = static_cast<Pointer>(const_cast<void*>(pairs.pred));
    const auto* target = static_cast<Pointer>(const_cast<void*>(pairs.target));
    dispatch_kind(pairs.kind, [&](auto kind) {
      const auto run = [&](int64_t block, int64_t first, int64_t size) {
        Vec total{};
        for_each_vec(size, [&](int64_t i, auto lanes) {
          const Vec value = loss_of<kind.value>(
              load_boxes(pred, first + i, lanes),
              load_boxes(target, first + i, lanes),
              pairs.eps);
          if (sums == nullptr) {
            store(loss + first + i, value, lanes);
          } else {
            total += only(value, lanes);
          }
        });
        if (sums != nullptr) {
          sums[block] = sum(total);
        }
      };
      for_each_block(pairs.count, begin, end, run);
    });
  });
}

void box_iou_loss_backward(
    const BoxPairs& pairs,
    const float* grad_out,
    bool shared_grad,
    void* grad_pred,
    int64_t begin,
    int64_t end) {
  dispatch(pairs.dtype, [&](auto* tag) {
    using Pointer = decltype(tag);
    const auto* pred = static_cast<Pointer>(const_cast<void*>(pairs.pred));
    const auto* target = static_cast<Pointer>(const_cast<void*>(pairs.target));
    auto* grads = static_cast<Pointer>(grad_pred);
    dispatch_kind(pairs.kind, [&](auto kind) {
      const auto run = [&](int64_t, int64_t first, int64_t size) {
        for_each_vec(size, [&](int64_t i, auto lanes) {
          const Vec g = shared_grad ? broadcast(*grad_out)
                                    : load(grad_out + first + i, lanes);
          const Boxes slope = grad_of<kind.value>(
              load_boxes(pred, first + i, lanes),
              load_boxes(target, first + i, lanes),
              pairs.eps);
          store_boxes(
              grads,
              first + i,
              {g * slope.x1, g * slope.y1, g * slope.x2, g * slope.y2},
              lanes);
        });
      };
      for_each_block(pairs.count, begin, end, run);
    });
  });
}

// ---- focal loss -------------------------------------------------------------

// e^-x for x >= 0, and e^-87 (1e-38) where it is smaller still: results stay
// normal, which spares most of what exp() does.
DLKERNELS_INLINE Vec exp_minus(Vec x) {
  constexpr float kRounder = 12582912.0f;
  const Vec clamped = x > 87.0f ? broadcast(87.0f) : x;
  const Vec shifted = kRounder - clamped * 1.44269504088896341f;
  const Vec n = shifted - kRounder;
  const Vec r = -clamped - n * 0.693359375f - n * -2.12194440e-4f;
  Vec p = broadcast(1.3981999507e-3f) + 1.9875691500e-4f * r;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec mantissa = (p * r * r + r) + 1.0f;
  return as_float(as_bits(mantissa) + (as_bits(shifted) << 23));
}

// ln(1 + e) for 0 <= e <= 1, exact for tiny e too, where s = e / (2 + e).
DLKERNELS_INLINE Vec log1p_of(Vec s) {
  return 2.0f * s * atanh_series(s * s);
}

// The sigmoid and what the cross entropy is made of.
struct Sigmoid {
  Vec positive;   // sigmoid(x)
  Vec negative;   // sigmoid(-x)
  Vec log1p_exp;  // ln(1 + exp(-|x|))

  DLKERNELS_INLINE Sigmoid of(Vec x) {
    const Vec e = exp_minus(absolute(x));
    const Vec inverse = 1.0f / ((1.0f + e) * (2.0f + e));
    const Vec near = (2.0f + e) * inverse;
    const Vec far = e * near;
    const auto above = x > 0.0f;
    return {
        above ? near : far,
        above ? far : near,
        log1p_of(e * (1.0f + e) * inverse)};
  }
};

// A vector of logits of one row: loss and slope for one of the target forms.
//
// With labels, `wrong` is the logit of the mistake (-x for the positive class,
// x for the others): loss = factor sigmoid(wrong)^gamma softplus(wrong).
struct HardTarget {
  Vec sign, factor;

  DLKERNELS_INLINE HardTarget
  of(const FocalRows& rows, int32_t label, int64_t column) {
    const auto hit = lane_numbers() + static_cast<int32_t>(column) == label;
    return {
        hit ? broadcast(-1.0f) : broadcast(1.0f),
        hit ? broadcast(rows.positive) : broadcast(rows.negative)};
  }

  DLKERNELS_INLINE Vec loss(const HardTarget& t, Vec x, float gamma) {
    const Vec wrong = t.sign * x;
    const Sigmoid s = Sigmoid::of(wrong);
    const Vec cross_entropy = relu(wrong) + s.log1p_exp;
    return t.factor * power(s.positive, gamma) * cross_entropy;
  }

  DLKERNELS_INLINE Vec slope(const HardTarget& t, Vec x, float gamma) {
    const Vec wrong = t.sign * x;
    const Sigmoid s = Sigmoid::of(wrong);
    const Vec cross_entropy = relu(wrong) + s.log1p_exp;
    return t.sign * t.factor * power(s.positive, gamma) *
           (gamma * s.negative * cross_entropy + s.positive);
  }
};

struct SoftTarget {
  Vec target, factor;

  DLKERNELS_INLINE SoftTarget of(const FocalRows& rows, Vec target) {
    return {target, rows.positive * target + rows.negative * (1.0f - target)};
  }

  DLKERNELS_INLINE Vec
  cross_entropy(const SoftTarget& t, Vec x, const Sigmoid& s) {
    return ((1.0f - t.target) * x + relu(-x)) + s.log1p_exp;
  }

  // One minus the probability of the target.
  DLKERNELS_INLINE Vec miss(const SoftTarget& t, const Sigmoid& s) {
    return s.positive * (1.0f - t.target) + s.negative * t.target;
  }

  DLKERNELS_INLINE Vec loss(const SoftTarget& t, Vec x, float gamma) {
    const Sigmoid s = Sigmoid::of(x);
    return t.factor * power(miss(t, s), gamma) * cross_entropy(t, x, s);
  }

  DLKERNELS_INLINE Vec slope(const SoftTarget& t, Vec x, float gamma) {
    const Sigmoid s = Sigmoid::of(x);
    const Vec m = miss(t, s);
    const Vec by_miss = gamma * s.positive * s.negative *
                        (1.0f - 2.0f * t.target) * cross_entropy(t, x, s) / m;
    // m is 0 where the logit is certain and right; NaN stays NaN.
    const Vec by_logit = s.positive * (1.0f - t.target) - s.negative * t.target;
    return t.factor * power(m, gamma) *
           (by_logit + (m == 0.0f ? Vec{} : by_miss));
  }
};

// Calls body(i, row, column, lanes) for the vectors of each row within a block.
template <typename Body>
DLKERNELS_INLINE void for_each_logit(
    int64_t classes, int64_t first, int64_t size, const Body& body) {
  const int64_t end = first + size;
  int64_t row = first / classes;
  int64_t column = first % classes;
  for (int64_t i = first; i < end; ++row, column = 0) {
    const int64_t rest = classes - column;
    const int64_t length = rest < end - i ? rest : end - i;
    for_each_vec(length, [&](int64_t c, auto lanes) {
      body(i + c, row, column + c, lanes);
    });
    i += length;
  }
}

// How many elements ahead of their use logits are fetched: the arithmetic
// between two loads is too long for the hardware to see the stream.
constexpr int64_t kAhead = 1024;

// Calls body(i, logit, target, weight, lanes) with targets of either form.
template <typename T, typename Body>
DLKERNELS_INLINE void for_each_target(
    const FocalRows& rows,
    const T* logits,
    int64_t first,
    int64_t size,
    const Body& body) {
  const auto* targets = static_cast<const T*>(rows.targets);
  const auto weight_of = [&](int64_t row) {
    return rows.weight == nullptr ? 1.0f : rows.weight[row];
  };
  const auto soft = [&](int64_t i, int64_t row, int64_t, auto lanes) {
    __builtin_prefetch(logits + i + kAhead);
    __builtin_prefetch(targets + i + kAhead);
    const SoftTarget target = SoftTarget::of(rows, load(targets + i, lanes));
    body(i, load(logits + i, lanes), target, weight_of(row), lanes);
  };
  const auto hard = [&](int64_t i, int64_t row, int64_t column, auto lanes) {
    const int64_t label = rows.labels[row];
    const bool known = label >= 0 && label < rows.classes;
    __builtin_prefetch(logits + i + kAhead);
    const HardTarget target =
        HardTarget::of(rows, known ? static_cast<int32_t>(label) : -1, column);
    body(i, load(logits + i, lanes), target, weight_of(row), lanes);
  };
  if (targets != nullptr) {
    for_each_logit(rows.classes, first, size, soft);
  } else {
    for_each_logit(rows.classes, first, size, hard);
  }
}

void focal_loss(
    const FocalRows& rows,
    float* loss,
    float* sums,
    int64_t begin,
    int64_t end) {
  dispatch(rows.dtype, [&](auto* tag) {
    const auto* logits =
        static_cast<decltype(tag)>(const_cast<void*>(rows.logits));
    const auto run = [&](int64_t block, int64_t first, int64_t size) {
      Vec total{};
      const auto add = [&](int64_t i,
                           Vec logit,
                           const auto& target,
                           float weight,
                           auto lanes) {
        const Vec value = weight * target.loss(target, logit, rows.gamma);
        if (sums == nullptr) {
          store(loss + i, value, lanes);
        } else {
          total += only(value, lanes);
        }
      };
      for_each_target(rows, logits, first, size, add);
      if (sums != nullptr) {
        sums[block] = sum(total);
      }
    };
    for_each_block(rows.count, begin, end, run);
  });
}

void focal_loss_backward(
    const FocalRows& rows,
    const float* grad_out,
    bool shared_grad,
    void* grad_logits,
    int64_t begin,
    int64_t end) {
  dispatch(rows.dtype, [&](auto* tag) {
    const auto* logits =
        static_cast<decltype(tag)>(const_cast<void*>(rows.logits));
    auto* grads = static_cast<decltype(tag)>(grad_logits);
    const auto run = [&](int64_t, int64_t first, int64_t size) {
      const auto write = [&](int64_t i,
                             Vec logit,
                             const auto& target,
                             float weight,
                             auto lanes) {
        const Vec g =
            shared_grad ? broadcast(*grad_out) : load(grad_out + i, lanes);
        const Vec slope = target.slope(target, logit, rows.gamma);
        store(grads + i, g * weight * slope, lanes);
      };
      for_each_target(rows, logits, first, size, write);
    };
    for_each_block(rows.count, begin, end, run);
  });
}

}  // namespace

extern const BoxesKernels boxes_kernels = {
    box_iou_loss,
    box_iou_loss_backward,
    focal_loss,
    focal_loss_backward,
};

}  // namespace DLKERNELS_CPU_CAPABILITY
}  // namespace dlkernels
