// Matrix products of bfloat16 operands for CPUs with avx512_bf16, summed in float.
//
// Compiled by megatron_tst/ops/native/products.py, which gives shapes. Tensors are contiguous. A
// tile of the result, 6 rows of 64 columns, stays in the registers while all products for it are
// added up: an instruction multiplies pairs of values, and adds both products. So the right operand
// is brought into room in pairs that lie side by side, some columns after the other.
//
// n positions, v vocabulary, h hidden size. v and h are even.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using bfloat16 = uint16_t;  // its bits

constexpr int64_t kRows = 6, kColumns = 64;  // of a tile
constexpr int64_t kLane = 16;                // floats, or pairs, of a register
constexpr int64_t kDepth = 256;              // pairs of the right operand in room, with all columns
constexpr int64_t kPanel = 96;               // columns of a transposed left operand in room
constexpr int64_t kAhead = 16;               // rows that are fetched before they are read

// The first n lanes.
inline __mmask16 lanes(int64_t n) {
  return n >= kLane ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

template <typename T>
inline void fetch(const T *first, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T)))
    _mm_prefetch(reinterpret_cast<const char *>(first + i), _MM_HINT_T0);
}

// Pairs of two rows, the lower of which may be absent; zeros from n to whole.
inline void pair_rows(const bfloat16 *upper, const bfloat16 *lower, int64_t n, int64_t whole,
                      uint32_t *out) {
  int64_t i = 0;
  if (lower != nullptr)
    for (; i + kLane <= n; i += kLane) {
      const auto row = [i](const bfloat16 *from) {
        return _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i)));
      };
      const __m512i pairs = _mm512_or_si512(row(upper), _mm512_slli_epi32(row(lower), 16));
      _mm512_storeu_si512(out + i, pairs);
    }
  for (; i < n; ++i) out[i] = upper[i] | (lower ? static_cast<uint32_t>(lower[i]) << 16 : 0);
  for (; i < whole; ++i) out[i] = 0;
}

// Brings rows 2 k and 2 k + 1 of [n, h] into room[tile][k], for k < pairs.
inline void pair_all_rows(const bfloat16 *rows, int64_t n, int64_t h, int64_t pairs,
                          uint32_t *room) {
  for (int64_t k = 0; k < pairs; ++k, rows += 2 * h) {
    const bfloat16 *lower = 2 * k + 1 < n ? rows + h : nullptr;
    for (int64_t first = 0; first < h; first += kColumns)
      pair_rows(rows + first, lower ? lower + first : nullptr, std::min(kColumns, h - first),
                kColumns, room + (first * pairs) + k * kColumns);
  }
}

// 16 rows of 16 become 16 columns.
inline void transpose(__m512i (&m)[kLane]) {
  __m512i t[kLane];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Quarter q of m[4 i + j] now holds column 4 q + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(m[j], m[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(m[j], m[4 + j], 0xdd);
    const __m512i more_even = _mm512_shuffle_i32x4(m[8 + j], m[12 + j], 0x88);
    const __m512i more_odd = _mm512_shuffle_i32x4(m[8 + j], m[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, more_even, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
  }
  std::memcpy(m, t, sizeof t);
}

using Row = __m512[4];

// A tile of the result: calls store(row, sums) for each of its rows, of which there may be fewer.
// Pair k of row r of the left operand lies at left + r * row_bytes + k * pair_bytes.
template <typename F>
inline void multiply(const void *left, int64_t row_bytes, int64_t pair_bytes, const uint32_t *right,
                     int64_t pairs, int64_t rows, F store) {
  Row sums[kRows];
  const char *pair_of[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    // A row that is not there is computed like the last one.
    pair_of[r] = static_cast<const char *>(left) + std::min<int64_t>(r, rows - 1) * row_bytes;
    for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k, right += kColumns) {
    __m512bh values[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      values[c] = (__m512bh)_mm512_load_si512(right + kLane * c);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, pair_of[r] + k * pair_bytes, sizeof pair);
      const auto factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], factor, values[c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
    if (r < rows) store(r, sums[r]);
}

inline void add_row(float *out, int64_t columns, const Row &sums) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c, out += kLane) {
    const __mmask16 mask = lanes(columns - kLane * c);
    const __m512 before = _mm512_maskz_loadu_ps(mask, out);
    _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(before, sums[c]));
  }
}

inline void round_row(bfloat16 *out, int64_t columns, const Row &sums) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c, out += kLane) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh(sums[c]);
    _mm256_mask_storeu_epi16(out, lanes(columns - kLane * c), rounded);
  }
}

}  // namespace

extern "C" {

// logits [n, v] = states [n, h] times the transposed weight [v, h]. room: [h / 2, 64].
void logits_of(const bfloat16 *states, const bfloat16 *weight, bfloat16 *logits, uint32_t *room,
               int64_t n, int64_t v, int64_t h) {
  const int64_t pairs = h / 2;
  for (int64_t first = 0; first < v; first += kColumns) {
    const int64_t columns = std::min(kColumns, v - first);
    for (int64_t c = 0; c < kColumns; c += kLane)
      for (int64_t k = 0; k < pairs; k += kLane) {
        __m512i block[kLane];
        for (int64_t i = 0; i < kLane; ++i) {
          const __mmask16 mask = c + i < columns ? lanes(pairs - k) : 0;
          block[i] = _mm512_maskz_loadu_epi32(mask, weight + (first + c + i) * h + 2 * k);
        }
        transpose(block);
        for (int64_t i = 0; i < kLane && k + i < pairs; ++i)
          _mm512_store_si512(room + (k + i) * kColumns + c, block[i]);
      }
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row);
      bfloat16 *out = logits + row * v + first;
      for (int64_t r = 0; r < rows; ++r) fetch(out + r * v, columns);
      multiply(states + row * h, 2 * h, 4, room, pairs, rows,
               [=](int r, const Row &sums) { round_row(out + r * v, columns, sums); });
    }
  }
}

// sums [n, h] += left [n, v] times right [v, h]. room: [256, h to whole tiles].
void add_product(const bfloat16 *left, const bfloat16 *right, float *sums, uint32_t *room,
                 int64_t n, int64_t v, int64_t h) {
  for (int64_t first = 0; first < v; first += 2 * kDepth) {
    const int64_t pairs = std::min(kDepth, (v - first) / 2);
    pair_all_rows(right + first * h, 2 * pairs, h, pairs, room);
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row);
      const bfloat16 *factors = left + row * v + first;
      for (int64_t r = rows; r < 2 * rows && row + r < n; ++r) fetch(factors + r * v, 2 * pairs);
      for (int64_t c = 0; c < h; c += kColumns) {
        float *out = sums + row * h + c;
        const int64_t columns = std::min(kColumns, h - c);
        multiply(factors, 2 * v, 4, room + c * pairs, pairs, rows,
                 [=](int r, const Row &tile) { add_row(out + r * h, columns, tile); });
      }
    }
  }
}

// sums [v, h] += the transposed left [n, v] times right [n, h].
// room: [n / 2 upwards, h to whole tiles] and [n / 2 upwards, 96].
void add_transposed_product(const bfloat16 *left, const bfloat16 *right, float *sums,
                            uint32_t *room, int64_t n, int64_t v, int64_t h) {
  const int64_t pairs = (n + 1) / 2;
  uint32_t *panel = room + (h + kColumns - 1) / kColumns * kColumns * pairs;
  pair_all_rows(right, n, h, pairs, room);
  for (int64_t first = 0; first < v; first += kPanel) {
    const int64_t width = std::min(kPanel, v - first);
    for (int64_t k = 0; k < pairs; ++k) {
      const bfloat16 *upper = left + 2 * k * v + first;
      for (int64_t r = kAhead; r < kAhead + 2 && 2 * k + r < n; ++r) fetch(upper + r * v, width);
      pair_rows(upper, 2 * k + 1 < n ? upper + v : nullptr, width, kPanel, panel + k * kPanel);
    }
    for (int64_t c = 0; c < h; c += kColumns)
      for (int64_t row = 0; row < width; row += kRows) {
        float *out = sums + (first + row) * h + c;
        const int64_t rows = std::min(kRows, width - row), columns = std::min(kColumns, h - c);
        for (int64_t r = 0; r < rows; ++r) fetch(out + r * h, columns);
        multiply(panel + row, 4, 4 * kPanel, room + c * pairs, pairs, rows,
                 [=](int r, const Row &tile) { add_row(out + r * h, columns, tile); });
      }
  }
}

}  // extern "C"
