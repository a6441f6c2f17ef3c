// Convolution for AMX: 32 pixels of out x 32 channels = sum over taps and channels of tiles of x * tiles of weight.
//
// In bfloat16 that is one product. Float32 numbers are split into two bfloat16 parts, v = v_0 + v_1 with an error of
// 2^-17 v, and three of the four products are summed: x_1 w_0 + x_0 w_0 + x_0 w_1; two, where the weights are bfloat16
// numbers and w_1 is zero. They share their tiles: 8 loads for 12 products, where bfloat16 takes 4 for 4.
#include "conv_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "amx_tiles.h"

namespace dmv_fast {
namespace {

template <int kParts> struct NumberOf { using Type = uint16_t; };
template <> struct NumberOf<2> { using Type = float; };
template <int kParts> using Number = typename NumberOf<kParts>::Type;

inline __m512 widened(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m512 first(__m512i halves) { return widened(_mm512_castsi512_si256(halves)); }
inline __m512 second(__m512i halves) { return widened(_mm512_extracti64x4_epi64(halves, 1)); }
inline __m512i halved(__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }

inline void clear(uint16_t* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kChunk) _mm512_store_si512(to + i, _mm512_setzero_si512());
}

inline void put(const uint16_t* from, uint16_t* to, int64_t) { _mm512_store_si512(to, _mm512_loadu_si512(from)); }

inline void put(const float* from, uint16_t* to, int64_t plane) {
  const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
  const __m512i high = halved(a, b);
  _mm512_store_si512(to, high);
  _mm512_store_si512(to + plane, halved(_mm512_sub_ps(a, first(high)), _mm512_sub_ps(b, second(high))));
}

// Rows of x, padded, as tiles are loaded from them: neighbours in a row lie side by side, 32 channels each. It costs
// a tenth of the convolution at most, and x is any tensor, of any width.
template <int kParts>
void lay_out(const Convolving& c, int64_t crop, int64_t from_row, int64_t count, uint16_t* to) {
  const int64_t chunks = c.c_in / kChunk, plane = c.plane(), columns = c.read_columns();
  const auto* const image = static_cast<const Number<kParts>*>(c.x) + crop * c.height * c.width * c.c_in;
  for (int64_t row = from_row; row < from_row + count; ++row, to += c.row_step()) {
    if (row < 0 || row >= c.read_rows()) {
      clear(to, c.row_step());
      continue;
    }
    for (int64_t p = 0; p < chunks * kParts; ++p) {
      clear(to + p * plane, c.padding * kChunk);
      clear(to + p * plane + (c.padding + columns) * kChunk, c.padding * kChunk);
    }
    const auto* from = image + row * c.skip * c.width * c.c_in;
    for (int64_t x = 0; x < columns; ++x, from += c.skip * c.c_in) {
      uint16_t* pixel = to + (x + c.padding) * kChunk;
      for (int64_t k = 0; k < chunks; ++k, pixel += kParts * plane) put(from + k * kChunk, pixel, plane);
    }
  }
}

inline __m512 read(const float* from) { return _mm512_loadu_ps(from); }

// Scale, bias, what it is added to, and the rectifier: pixel by pixel between the next block's products, which leave the
// vector units idle. Done in one go they would wait for the sums, and the next products for them.
template <int kParts>
struct Finish {
  const float *sums = nullptr, *scale = nullptr, *bias = nullptr;
  Number<kParts>* out[2] = {};  // of each segment
  int64_t pixels[2] = {}, step = 0;
  int at = 0, end = 0;
  bool add = false;
  float least = 0;

  void some(int count) {
    const __m512 scale0 = read(scale), scale1 = read(scale + 16), bias0 = read(bias), bias1 = read(bias + 16);
    const __m512 floor = _mm512_set1_ps(least);
    for (const int until = at + count < end ? at + count : end; at < until; ++at) {
      const int segment = at >= kSegment, pixel = at % kSegment;
      if (pixel >= pixels[segment]) continue;
      const __m512 a = _mm512_fmadd_ps(read(sums + at * 32), scale0, bias0);
      const __m512 b = _mm512_fmadd_ps(read(sums + at * 32 + 16), scale1, bias1);
      finish(a, b, floor, out[segment] + pixel * step);
    }
  }

  void finish(__m512 a, __m512 b, __m512 floor, float* to) const {
    if (add) a = _mm512_add_ps(a, read(to)), b = _mm512_add_ps(b, read(to + 16));
    _mm512_storeu_ps(to, _mm512_max_ps(floor, a));
    _mm512_storeu_ps(to + 16, _mm512_max_ps(floor, b));
  }

  void finish(__m512 a, __m512 b, __m512 floor, uint16_t* to) const {
    if (add) {
      const __m512i onto = _mm512_loadu_si512(to);
      a = _mm512_add_ps(a, first(onto)), b = _mm512_add_ps(b, second(onto));
    }
    _mm512_storeu_si512(to, halved(_mm512_max_ps(floor, a), _mm512_max_ps(floor, b)));
  }
};

// The next block's weights, brought from L3 to L2 meanwhile.
struct Ahead {
  const char *next, *end;
  int64_t lines;
  void some() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// a0, a1: the two segments' first pixels. A row's taps follow each other, so that two of three find their pixels in L1.
template <int kParts, int kWeightParts>
inline void block(
    const Convolving& c, const uint16_t* a0, const uint16_t* a1, const uint16_t* w, float* sums, Finish<kParts>& last,
    int pixels, Ahead& ahead) {
  zero_sums();
  const int64_t kernel = c.kernel, chunks = c.c_in / c.groups / kChunk, plane = c.plane();
  const int64_t stride = c.stride * kChunk * 2, tap = c.dilation * kChunk, down = c.dilation * c.row_step();
  for (int64_t ky = 0; ky < kernel; ++ky)
    for (int64_t k = 0; k < chunks; ++k) {
      const uint16_t* p0 = a0 + ky * down + k * kParts * plane;
      const uint16_t* p1 = a1 + ky * down + k * kParts * plane;
      for (int64_t kx = 0; kx < kernel; ++kx, p0 += tap, p1 += tap, w += kWeightParts * 2 * kTileNumbers) {
        constexpr int64_t kLast = kParts - 1;
        _tile_loadd(4, p0 + kLast * plane, stride);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + kTileNumbers, 64);
        _tile_loadd(5, p1 + kLast * plane, stride);
        add_products();
        if constexpr (kParts == 2) {
          _tile_loadd(4, p0, stride);
          _tile_loadd(5, p1, stride);
          add_products();
        }
        if constexpr (kWeightParts == 2) {
          _tile_loadd(6, w + 2 * kTileNumbers, 64);
          _tile_loadd(7, w + 3 * kTileNumbers, 64);
          add_products();
        }
      }
      if (last.at < last.end) last.some(pixels);
      ahead.some();
    }
  store_sums(sums, kChunk);
}

// `count` rows of out, laid out in room.
template <int kParts, int kWeightParts>
void rows(const Convolving& c, const ConvolvingPart& part, int64_t row, int64_t count, const uint16_t* room) {
  const int64_t across = (c.columns + kSegment - 1) / kSegment, segments = count * across;
  const int64_t per_group = c.c_out / kChunk / c.groups, group_step = c.row_step() / c.groups;
  const int64_t steps = c.kernel * (c.c_in / c.groups / kChunk), calls = (segments + 1) / 2;
  const int pixels = static_cast<int>((2 * kSegment + steps - 1) / steps);
  alignas(64) float sums[2][2 * kSegment * kChunk];
  Finish<kParts> finish;
  finish.step = c.c_out;
  finish.add = c.add;
  finish.least = c.relu ? 0.0f : -__builtin_inff();
  int turn = 0;
  for (int64_t o = part.first_block; o < part.last_block; ++o) {
    const uint16_t* const weight = c.weight + o * c.per_block();
    const char* const next = reinterpret_cast<const char*>(weight + c.per_block());
    Ahead ahead{next, o + 1 < part.last_block ? next + c.per_block() * 2 : next, c.per_block() / (calls * steps * 32) + 1};
    for (int64_t s = 0; s < segments; s += 2, turn ^= 1) {
      const uint16_t* from[2];
      Number<kParts>* to[2];
      int64_t wide[2];
      for (int64_t i = 0; i < 2; ++i) {  // an odd one out is worked on twice and written once
        const int64_t t = s + i < segments ? s + i : s, y = t / across, x = t % across * kSegment;
        from[i] = room + o / per_group * group_step + y * c.stride * c.row_step() + x * c.stride * kChunk;
        to[i] = static_cast<Number<kParts>*>(c.out) +
            (((part.crop * c.rows) + row + y) * c.columns + x) * c.c_out + o * kChunk;
        wide[i] = t < s + i ? 0 : c.columns - x < kSegment ? c.columns - x : kSegment;
      }
      block<kParts, kWeightParts>(c, from[0], from[1], weight, sums[turn], finish, pixels, ahead);
      finish.sums = sums[turn];
      finish.scale = c.scale + o * kChunk;
      finish.bias = c.bias + o * kChunk;
      finish.at = 0;
      finish.end = 2 * kSegment;
      for (int i = 0; i < 2; ++i) finish.out[i] = to[i], finish.pixels[i] = wide[i];
    }
  }
  finish.some(2 * kSegment);
}

template <int kParts, int kWeightParts>
void convolve(const Convolving& c, const ConvolvingPart& part, uint16_t* room) {
  begin_tiles();
  for (int64_t row = part.first_row; row < part.last_row; row += c.band) {
    const int64_t count = row + c.band < part.last_row ? c.band : part.last_row - row;
    lay_out<kParts>(c, part.crop, row * c.stride - c.padding, (count - 1) * c.stride + c.reach(), room);
    rows<kParts, kWeightParts>(c, part, row, count, room);
  }
  end_tiles();
}

}  // namespace

ConvolvePart convolve_amx(int parts, int weight_parts) {
  return parts == 1 ? convolve<1, 1> : weight_parts == 1 ? convolve<2, 1> : convolve<2, 2>;
}

}  // namespace dmv_fast
DMV_TARGET_END
#endif
