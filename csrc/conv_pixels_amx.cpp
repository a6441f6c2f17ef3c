// conv1 and its max pool for AMX: out = relu(bias + max over 3 x 3 of (sum over 7 x 7 x 3 of (pixel - mean) * w)).
//
// One row of the 7 x 7 window is 21 numbers side by side, so it is one product of depth 32, its last weights zero, and
// a tile of 16 windows is 16 overlapping rows of memory, two pixels apart. Pixels less a whole number are exact in
// bfloat16: float32 needs but the weights in two parts. Bias and rectifier change no order, so they wait for the maximum.
#include "conv_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "amx_tiles.h"

namespace dmv_fast {
namespace {

constexpr int64_t kKernel = 7, kBeside = 3, kColours = 3;

inline uint16_t half(float v) {
  return static_cast<uint16_t>(_mm_extract_epi16(reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_set_ss(v))), 0));
}

// The nearest whole number; a mean is not negative.
inline float whole(float v) { return static_cast<float>(static_cast<int>(v + 0.5f)); }

// Rows from..from + count of the crop, pixel - whole(mean), with mean colour around; zeros behind.
void lay_out(const PixelConvolving& c, int64_t crop, int64_t from, int64_t count, uint16_t* to) {
  const int64_t numbers = c.width * kColours, wide = numbers + 2 * kBeside * kColours;
  alignas(64) float mean[48];
  uint16_t around[kColours];
  for (int i = 0; i < 48; ++i) mean[i] = whole(c.mean[i % kColours]);
  for (int i = 0; i < kColours; ++i) around[i] = half(c.mean[i] - mean[i]);
  for (int64_t y = from; y < from + count; ++y, to += c.row_numbers()) {
    const bool inside = y >= 0 && y < c.height;
    const int64_t left = inside ? kBeside * kColours : wide;
    for (int64_t i = 0; i < left; ++i) to[i] = around[i % kColours];
    for (int64_t i = wide; i < c.row_numbers(); ++i) to[i] = 0;
    if (!inside) continue;
    for (int64_t i = 0; i < kBeside * kColours; ++i) to[left + numbers + i] = around[i % kColours];
    const uint8_t* const row = c.crops + (crop * c.height + y) * numbers;
    for (int64_t i = 0; i < numbers; i += 48)
      for (int64_t j = 0; j < 48; j += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i + j));
        const __m512 v = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_load_ps(mean + j));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + left + i + j), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
      }
  }
}

// One row of conv1's sums: [width / 2][c_out].
template <int kParts>
void sum_row(const PixelConvolving& c, const uint16_t* pixels, float* sums) {
  constexpr int64_t kWindow = 2 * kColours, kStep = kWindow * 2;
  const uint16_t* weight = c.weight;
  for (int64_t o = 0; o < c.c_out; o += kChunk, weight += kKernel * kParts * 2 * kTileNumbers)
    for (int64_t x = 0; x < c.width / 2; x += 2 * kSegment) {
      zero_sums();
      const uint16_t *w = weight, *a = pixels + x * kWindow;
      for (int64_t ky = 0; ky < kKernel; ++ky, a += c.row_numbers()) {
        _tile_loadd(4, a, kStep);
        _tile_loadd(5, a + kSegment * kWindow, kStep);
        for (int part = 0; part < kParts; ++part, w += 2 * kTileNumbers) {
          _tile_loadd(6, w, 64);
          _tile_loadd(7, w + kTileNumbers, 64);
          add_products();
        }
      }
      store_sums(sums + x * c.c_out + o, c.c_out);
    }
}

inline void put(__m512 a, __m512 b, float* to) {
  _mm512_storeu_ps(to, a);
  _mm512_storeu_ps(to + 16, b);
}

inline void put(__m512 a, __m512 b, uint16_t* to) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}

// One row of out from three of sums; at the crop's upper edge the first is the second again.
template <class Number>
void pool_row(const PixelConvolving& c, const float* const (&sums)[3], Number* out) {
  auto column = [&](int64_t at) {
    const __m512 both = _mm512_max_ps(_mm512_loadu_ps(sums[0] + at), _mm512_loadu_ps(sums[1] + at));
    return _mm512_max_ps(both, _mm512_loadu_ps(sums[2] + at));
  };
  for (int64_t o = 0; o < c.c_out; o += kChunk) {
    const __m512 bias0 = _mm512_loadu_ps(c.bias + o), bias1 = _mm512_loadu_ps(c.bias + o + 16);
    __m512 before0 = column(o), before1 = column(o + 16);
    for (int64_t x = 0; x < c.width / 4; ++x) {
      const int64_t at = 2 * x * c.c_out + o;
      const __m512 after0 = column(at + c.c_out), after1 = column(at + c.c_out + 16);
      const __m512 most0 = _mm512_max_ps(_mm512_max_ps(before0, column(at)), after0);
      const __m512 most1 = _mm512_max_ps(_mm512_max_ps(before1, column(at + 16)), after1);
      const __m512 zero = _mm512_setzero_ps();
      put(_mm512_max_ps(zero, _mm512_add_ps(most0, bias0)), _mm512_max_ps(zero, _mm512_add_ps(most1, bias1)),
          out + x * c.c_out + o);
      before0 = after0, before1 = after1;
    }
  }
}

template <int kParts, class Number>
void convolve_pixels(const PixelConvolving& c, int64_t crop, int64_t first, int64_t last, uint16_t* room) {
  begin_tiles();
  const int64_t count = c.read_rows(last - first), above = 2 * first - 1, size = c.width / 2 * c.c_out;
  float* const sums = reinterpret_cast<float*>(room + count * c.row_numbers());
  lay_out(c, crop, 2 * above - kBeside, count, room);
  auto row = [&](int64_t r) {  // three rows of sums are kept
    float* const to = sums + (r + 3) % 3 * size;
    sum_row<kParts>(c, room + 2 * (r - above) * c.row_numbers(), to);
    return to;
  };
  const float* before = above >= 0 ? row(above) : nullptr;
  Number* out = static_cast<Number*>(c.out) + (crop * (c.height / 4) + first) * (c.width / 4) * c.c_out;
  for (int64_t y = first; y < last; ++y, out += c.width / 4 * c.c_out) {
    const float *middle = row(2 * y), *after = row(2 * y + 1);
    pool_row(c, {before ? before : middle, middle, after}, out);
    before = after;
  }
  end_tiles();
}

}  // namespace

ConvolvePixels convolve_pixels_amx(int parts) {
  return parts == 2 ? convolve_pixels<2, float> : convolve_pixels<1, uint16_t>;
}

}  // namespace dmv_fast
DMV_TARGET_END
#endif
