// What surrounds the matrix products of a model: norms, rotations, softmax, SwiGLU and the loss.
//
// Compiled at the start of a run by megatron_tst/ops/native/kernels.py, which gives shapes and dtypes.
// Tensors are contiguous, float or bfloat16; all arithmetic is float. Every function has a twin of
// torch operators, which serves where there is no compiler, and a test against it.
//
// l positions, b sequences, h hidden size, g groups of keys, r heads a group, d head size,
// v vocabulary, s targets of a bag.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float load(const float *p) { return *p; }

inline float load(const bfloat16 *p) {
  const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void store(float *p, float value) { *p = value; }

// To the nearest, halves to even. A NaN stays one.
inline void store(bfloat16 *p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Values of a row that are computed before they are rounded together; whole vectors of any CPU.
constexpr int64_t kPart = 32;

inline int64_t whole_parts(int64_t n) { return (n + kPart - 1) / kPart * kPart; }

// Rounds and stores kPart values.
inline void store_part(bfloat16 *out, const float *part) {
#ifdef __AVX512BF16__
  // The CPU does it, and takes denormals for 0.
  const auto rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(part + 16), _mm512_loadu_ps(part));
  std::memcpy(static_cast<void *>(out), &rounded, sizeof rounded);
#else
#pragma omp simd
  for (int64_t i = 0; i < kPart; ++i) store(out + i, part[i]);
#endif
}

struct Pair {
  float one, other;
};

// Stores both values of compute(i), for i < n.
template <typename T, typename F>
inline void store_rows(T *one, T *other, int64_t n, F compute) {
  int64_t done = 0;
  if constexpr (std::is_same_v<T, bfloat16>)
    for (; done + kPart <= n; done += kPart) {
      alignas(64) float ones[kPart], others[kPart];
#pragma omp simd
      for (int64_t i = 0; i < kPart; ++i) {
        const Pair values = compute(done + i);
        ones[i] = values.one, others[i] = values.other;
      }
      store_part(one + done, ones);
      store_part(other + done, others);
    }
#pragma omp simd
  for (int64_t i = done; i < n; ++i) {
    const Pair values = compute(i);
    store(one + i, values.one);
    store(other + i, values.other);
  }
}

// Stores value(i) for i < n.
template <typename T, typename F>
inline void store_row(T *out, int64_t n, F value) {
  int64_t done = 0;
  if constexpr (std::is_same_v<T, bfloat16>)
    for (; done + kPart <= n; done += kPart) {
      alignas(64) float part[kPart];
#pragma omp simd
      for (int64_t i = 0; i < kPart; ++i) part[i] = value(done + i);
      store_part(out + done, part);
    }
#pragma omp simd
  for (int64_t i = done; i < n; ++i) store(out + i, value(i));
}

// Within 2 units in the last place; 0 below -87, constant above 88. Branchless, to be vectorised. The
// order of its comparisons lets a NaN through and decides what compilers make of a loop over it.
inline float exponential(float x) {
  float clamped = 88.0f < x ? 88.0f : x;
  clamped = -87.0f > clamped ? -87.0f : clamped;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float power = shifted - 12582912.0f;
  float rest = clamped - power * 0.693359375f;
  rest = rest + power * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  // The integer is in the last bits of ``shifted``; the exponent of a float is 127 more.
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : series * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// y = x / rms(x) * weight of each row, and inverse = 1 / rms(x).
template <typename T>
void rms_norm(const T *x, const T *weight, T *y, float *inverse, int64_t rows, int64_t h,
              float eps) {
  for (int64_t row = 0; row < rows; ++row, x += h, y += h) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h; ++i) sum += load(x + i) * load(x + i);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(h) + eps);
    inverse[row] = scale;
    store_row(y, h, [=](int64_t i) { return load(x + i) * scale * load(weight + i); });
  }
}

// With n = x / rms(x): grad_x = residual + (grad * weight - n * mean(grad * weight * n)) / rms(x),
// where residual (or nothing) is the gradient that reaches x past the norm. grad_weight is [2, h]:
// the sum over all rows, and room for that of some, so that rounding does not add up.
template <typename T>
void rms_norm_gradient(const T *grad, const T *x, const T *weight, const float *inverse,
                       const T *residual, T *grad_x, float *grad_weight, int64_t rows, int64_t h) {
  float *part = grad_weight + h;
  for (int64_t row = 0; row < rows; ++row, grad += h, x += h, grad_x += h) {
    const float scale = inverse[row];
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < h; ++i) {
      const float product = load(grad + i) * load(x + i) * scale;
      part[i] += product;
      along += product * load(weight + i);
    }
    along /= static_cast<float>(h);
    const auto own = [=](int64_t i) {
      return (load(grad + i) * load(weight + i) - load(x + i) * scale * along) * scale;
    };
    if (residual) {
      store_row(grad_x, h, [=](int64_t i) { return load(residual + i) + own(i); });
      residual += h;
    } else {
      store_row(grad_x, h, own);
    }
    if (row % 128 == 127 || row == rows - 1)
#pragma omp simd
      for (int64_t i = 0; i < h; ++i) grad_weight[i] += part[i], part[i] = 0;
  }
}

// [l, b, g, (r + 2) d] -> query [b, g, l, r, d], key and value [b, g, l, d], rotated by the angles
// whose cosines and sines are [l, d]. The halves of a head are rotated against each other.
template <typename T>
void rotate(const T *in, const T *cosine, const T *sine, T *out, int64_t d) {
  const int64_t half = d / 2;
  const T *second = in + half;
  store_row(out, half, [=](int64_t i) {
    return load(in + i) * load(cosine + i) - load(second + i) * load(sine + i);
  });
  store_row(out + half, half, [=](int64_t i) {
    return load(second + i) * load(cosine + half + i) + load(in + i) * load(sine + half + i);
  });
}

template <typename T>
void rotate_back(const T *in, const T *cosine, const T *sine, T *out, int64_t d) {
  const int64_t half = d / 2;
  const T *second = in + half;
  store_row(out, half, [=](int64_t i) {
    return load(in + i) * load(cosine + i) + load(second + i) * load(sine + half + i);
  });
  store_row(out + half, half, [=](int64_t i) {
    return load(second + i) * load(cosine + half + i) - load(in + i) * load(sine + i);
  });
}

template <typename T>
void split_heads(const T *mixed, const T *cosine, const T *sine, T *query, T *key, T *value,
                 int64_t l, int64_t b, int64_t g, int64_t r, int64_t d) {
  for (int64_t at = 0; at < l; ++at)
    for (int64_t sequence = 0; sequence < b; ++sequence)
      for (int64_t group = 0; group < g; ++group, mixed += (r + 2) * d) {
        const int64_t place = (sequence * g + group) * l + at;
        const T *c = cosine + at * d, *s = sine + at * d;
        for (int64_t head = 0; head < r; ++head)
          rotate(mixed + head * d, c, s, query + (place * r + head) * d, d);
        rotate(mixed + r * d, c, s, key + place * d, d);
        std::memcpy(value + place * d, mixed + (r + 1) * d, d * sizeof(T));
      }
}

template <typename T>
void join_head_gradients(const T *query, const T *key, const T *value, const T *cosine,
                         const T *sine, T *mixed, int64_t l, int64_t b, int64_t g, int64_t r,
                         int64_t d) {
  for (int64_t at = 0; at < l; ++at)
    for (int64_t sequence = 0; sequence < b; ++sequence)
      for (int64_t group = 0; group < g; ++group, mixed += (r + 2) * d) {
        const int64_t place = (sequence * g + group) * l + at;
        const T *c = cosine + at * d, *s = sine + at * d;
        for (int64_t head = 0; head < r; ++head)
          rotate_back(query + (place * r + head) * d, c, s, mixed + head * d, d);
        rotate_back(key + place * d, c, s, mixed + r * d, d);
        std::memcpy(mixed + (r + 1) * d, value + place * d, d * sizeof(T));
      }
}

// In place: scores [n, rows, keys] to probabilities. Row i belongs to position first + i / r, which
// sees the keys up to its own. Rows are computed in whole parts, as what is left of a loop over
// vectors is slow; keys that are not seen have scores of minus infinity in scratch [whole parts].
template <typename T>
void causal_softmax(T *scores, int64_t n, int64_t rows, int64_t keys, int64_t first, int64_t r,
                    float scale, float *scratch) {
  for (int64_t item = 0; item < n; ++item)
    for (int64_t row = 0; row < rows; ++row, scores += keys) {
      const int64_t seen = first + row / r + 1, padded = whole_parts(seen);
      const int64_t stored = padded < keys ? padded : keys;
#pragma omp simd
      for (int64_t i = 0; i < stored; ++i) scratch[i] = load(scores + i);
      for (int64_t i = seen; i < padded; ++i) scratch[i] = -std::numeric_limits<float>::infinity();
      float highest = scratch[0];
#pragma omp simd reduction(max : highest)
      for (int64_t i = 0; i < padded; ++i) highest = scratch[i] > highest ? scratch[i] : highest;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < padded; ++i) {
        const float e = exponential((scratch[i] - highest) * scale);
        scratch[i] = e;
        sum += e;
      }
      const float inverse = 1.0f / sum;
      store_row(scores, stored, [=](int64_t i) { return scratch[i] * inverse; });
      std::memset(static_cast<void *>(scores + stored), 0, (keys - stored) * sizeof(T));
    }
}

// In place: gradients of probabilities [n, rows, keys] to those of scores before the scale. Keys that
// are not seen have probabilities of 0.
template <typename T>
void causal_softmax_gradient(const T *probabilities, T *grad, int64_t n, int64_t rows, int64_t keys,
                             int64_t first, int64_t r, float scale) {
  for (int64_t item = 0; item < n; ++item)
    for (int64_t row = 0; row < rows; ++row, probabilities += keys, grad += keys) {
      const int64_t seen = first + row / r + 1, padded = whole_parts(seen);
      const int64_t stored = padded < keys ? padded : keys;
      std::memset(static_cast<void *>(grad + seen), 0, (keys - seen) * sizeof(T));
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t i = 0; i < stored; ++i) along += load(probabilities + i) * load(grad + i);
      store_row(grad, stored, [=](int64_t i) {
        return (load(grad + i) - along) * load(probabilities + i) * scale;
      });
    }
}

// [rows, 2 f], gate and up -> silu(gate) * up [rows, f].
template <typename T>
void swiglu(const T *gate_and_up, T *out, int64_t rows, int64_t f) {
  for (int64_t row = 0; row < rows; ++row, gate_and_up += 2 * f, out += f) {
    store_row(out, f, [=](int64_t i) {
      const float gate = load(gate_and_up + i);
      return gate * sigmoid(gate) * load(gate_and_up + f + i);
    });
  }
}

template <typename T>
void swiglu_gradient(const T *grad, const T *gate_and_up, T *out, int64_t rows, int64_t f) {
  for (int64_t row = 0; row < rows; ++row, grad += f, gate_and_up += 2 * f, out += 2 * f) {
    store_rows(out, out + f, f, [=](int64_t i) {
      const float gate = load(gate_and_up + i), up = load(gate_and_up + f + i), g = load(grad + i);
      const float s = sigmoid(gate);
      return Pair{g * up * s * (1.0f + gate * (1.0f - s)), g * gate * s};
    });
  }
}

// Loss of each row: log(sum(exp(z))) - sum of coefficient * z[column] over its targets.
template <typename T>
void multi_hot_loss(const T *logits, const int64_t *columns, const float *coefficients, float *loss,
                    float *log_sum_exp, int64_t rows, int64_t v, int64_t s) {
  for (int64_t row = 0; row < rows; ++row, logits += v, columns += s, coefficients += s) {
    float highest = load(logits);
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < v; ++i) {
      const float logit = load(logits + i);
      highest = logit > highest ? logit : highest;
    }
    // In parts, as a long sum in float loses digits.
    double total = 0;
    for (int64_t first = 0; first < v; first += 1024) {
      const int64_t stop = first + 1024 < v ? first + 1024 : v;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < stop; ++i) sum += exponential(load(logits + i) - highest);
      total += sum;
    }
    // Relative to the maximum, so that large logits do not take the digits of the loss. A target
    // without a share may have a logit of minus infinity.
    float target = 0;
    for (int64_t i = 0; i < s; ++i)
      if (coefficients[i] != 0) target += coefficients[i] * (load(logits + columns[i]) - highest);
    const float log_sum = std::log(static_cast<float>(total));
    log_sum_exp[row] = log_sum + highest;
    loss[row] = log_sum - target;
  }
}

// (softmax(z) - sum of coefficient * onehot(column)) * scale of each row; out may be the logits.
template <typename T>
void multi_hot_gradient(const T *logits, const int64_t *columns, const float *coefficients,
                        const float *log_sum_exp, const float *scale, T *out, float *scratch,
                        int64_t rows, int64_t v, int64_t s) {
  for (int64_t row = 0; row < rows; ++row, columns += s, coefficients += s, logits += v, out += v) {
    const float shift = log_sum_exp[row], factor = scale[row];
    // The columns of targets are rounded once, with all their shares, so they are computed aside.
    for (int64_t i = 0; i < s; ++i) {
      float value = exponential(load(logits + columns[i]) - shift);
      for (int64_t other = 0; other < s; ++other)
        if (columns[other] == columns[i]) value -= coefficients[other];
      scratch[i] = value * factor;
    }
    store_row(out, v, [=](int64_t i) { return exponential(load(logits + i) - shift) * factor; });
    for (int64_t i = 0; i < s; ++i)
      if (coefficients[i] != 0) store(out + columns[i], scratch[i]);
  }
}

// Mean over each bag [n, s] of the rows of a table [v, h]; a negative token has none. The divisor of
// a bag is its own, or s.
template <typename T>
void bag_mean(const T *table, const int64_t *tokens, const float *divisors, T *out, float *scratch,
              int64_t n, int64_t s, int64_t h) {
  for (int64_t bag = 0; bag < n; ++bag, tokens += s, out += h) {
    std::memset(scratch, 0, h * sizeof(float));
    for (int64_t offset = 0; offset < s; ++offset) {
      if (tokens[offset] < 0) continue;
      const T *row = table + tokens[offset] * h;
#pragma omp simd
      for (int64_t i = 0; i < h; ++i) scratch[i] += load(row + i);
    }
    const float divisor = divisors ? divisors[bag] : static_cast<float>(s);
    store_row(out, h, [=](int64_t i) { return scratch[i] / divisor; });
  }
}

// Gradient of the table: each row is the sum over the places of its token of grad / divisor, offset
// by offset, rounded once. places [n s] and starts [v + 1] are room for a sort by counting.
template <typename T>
void bag_mean_gradient(const T *grad, const int64_t *tokens, const float *divisors, T *out,
                       float *scratch, int64_t *places, int64_t *starts, int64_t n, int64_t s,
                       int64_t v, int64_t h) {
  std::memset(starts, 0, (v + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < n * s; ++i)
    if (tokens[i] >= 0) ++starts[tokens[i] + 1];
  for (int64_t row = 0; row < v; ++row) starts[row + 1] += starts[row];
  for (int64_t offset = 0; offset < s; ++offset)
    for (int64_t bag = 0; bag < n; ++bag) {
      const int64_t token = tokens[bag * s + offset];
      if (token >= 0) places[starts[token]++] = bag;
    }
  // Each start is now where the next row's places begin.
  int64_t place = 0;
  for (int64_t row = 0; row < v; ++row, out += h) {
    if (place == starts[row]) {
      std::memset(static_cast<void *>(out), 0, h * sizeof(T));
      continue;
    }
    std::memset(scratch, 0, h * sizeof(float));
    for (; place < starts[row]; ++place) {
      const T *share = grad + places[place] * h;
      const float divisor = divisors ? divisors[places[place]] : static_cast<float>(s);
#pragma omp simd
      for (int64_t i = 0; i < h; ++i) scratch[i] += load(share + i) / divisor;
    }
    store_row(out, h, [=](int64_t i) { return scratch[i]; });
  }
}

template <typename T>
void add_widened(const T *addend, float *total, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) total[i] += load(addend + i);
}

}  // namespace

#define FOR_BOTH_DTYPES(name, arguments, call)                                        \
  extern "C" void name##_float32 arguments(float) { return call; }                    \
  extern "C" void name##_bfloat16 arguments(bfloat16) { return call; }

#define RMS_NORM(T)                                                                   \
  (const T *x, const T *weight, T *y, float *inverse, int64_t rows, int64_t h, float eps)
FOR_BOTH_DTYPES(rms_norm, RMS_NORM, rms_norm(x, weight, y, inverse, rows, h, eps))

#define RMS_NORM_GRADIENT(T)                                                          \
  (const T *grad, const T *x, const T *weight, const float *inverse, const T *residual, \
   T *grad_x, float *grad_weight, int64_t rows, int64_t h)
FOR_BOTH_DTYPES(rms_norm_gradient, RMS_NORM_GRADIENT,
                rms_norm_gradient(grad, x, weight, inverse, residual, grad_x, grad_weight, rows, h))

#define SPLIT_HEADS(T)                                                                \
  (const T *mixed, const T *cosine, const T *sine, T *query, T *key, T *value, int64_t l, \
   int64_t b, int64_t g, int64_t r, int64_t d)
FOR_BOTH_DTYPES(split_heads, SPLIT_HEADS,
                split_heads(mixed, cosine, sine, query, key, value, l, b, g, r, d))

#define JOIN_HEAD_GRADIENTS(T)                                                        \
  (const T *query, const T *key, const T *value, const T *cosine, const T *sine, T *mixed, \
   int64_t l, int64_t b, int64_t g, int64_t r, int64_t d)
FOR_BOTH_DTYPES(join_head_gradients, JOIN_HEAD_GRADIENTS,
                join_head_gradients(query, key, value, cosine, sine, mixed, l, b, g, r, d))

#define CAUSAL_SOFTMAX(T)                                                             \
  (T *scores, int64_t n, int64_t rows, int64_t keys, int64_t first, int64_t r, float scale, \
   float *scratch)
FOR_BOTH_DTYPES(causal_softmax, CAUSAL_SOFTMAX,
                causal_softmax(scores, n, rows, keys, first, r, scale, scratch))

#define CAUSAL_SOFTMAX_GRADIENT(T)                                                    \
  (const T *probabilities, T *grad, int64_t n, int64_t rows, int64_t keys, int64_t first, \
   int64_t r, float scale)
FOR_BOTH_DTYPES(causal_softmax_gradient, CAUSAL_SOFTMAX_GRADIENT,
                causal_softmax_gradient(probabilities, grad, n, rows, keys, first, r, scale))

#define SWIGLU(T) (const T *gate_and_up, T *out, int64_t rows, int64_t f)
FOR_BOTH_DTYPES(swiglu, SWIGLU, swiglu(gate_and_up, out, rows, f))

#define SWIGLU_GRADIENT(T) \
  (const T *grad, const T *gate_and_up, T *out, int64_t rows, int64_t f)
FOR_BOTH_DTYPES(swiglu_gradient, SWIGLU_GRADIENT,
                swiglu_gradient(grad, gate_and_up, out, rows, f))

#define MULTI_HOT_LOSS(T)                                                             \
  (const T *logits, const int64_t *columns, const float *coefficients, float *loss,   \
   float *log_sum_exp, int64_t rows, int64_t v, int64_t s)
FOR_BOTH_DTYPES(multi_hot_loss, MULTI_HOT_LOSS,
                multi_hot_loss(logits, columns, coefficients, loss, log_sum_exp, rows, v, s))

#define MULTI_HOT_GRADIENT(T)                                                         \
  (const T *logits, const int64_t *columns, const float *coefficients,                \
   const float *log_sum_exp, const float *scale, T *out, float *scratch, int64_t rows, \
   int64_t v, int64_t s)
FOR_BOTH_DTYPES(multi_hot_gradient, MULTI_HOT_GRADIENT,
                multi_hot_gradient(logits, columns, coefficients, log_sum_exp, scale, out, scratch,
                                   rows, v, s))

#define BAG_MEAN(T)                                                                   \
  (const T *table, const int64_t *tokens, const float *divisors, T *out, float *scratch, \
   int64_t n, int64_t s, int64_t h)
FOR_BOTH_DTYPES(bag_mean, BAG_MEAN, bag_mean(table, tokens, divisors, out, scratch, n, s, h))

#define BAG_MEAN_GRADIENT(T)                                                          \
  (const T *grad, const int64_t *tokens, const float *divisors, T *out, float *scratch, \
   int64_t *places, int64_t *starts, int64_t n, int64_t s, int64_t v, int64_t h)
FOR_BOTH_DTYPES(bag_mean_gradient, BAG_MEAN_GRADIENT,
                bag_mean_gradient(grad, tokens, divisors, out, scratch, places, starts, n, s, v, h))

#define ADD_WIDENED(T) (const T *addend, float *total, int64_t n)
FOR_BOTH_DTYPES(add_widened, ADD_WIDENED, add_widened(addend, total, n))
