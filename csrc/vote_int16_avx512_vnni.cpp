// Voting for AVX512_VNNI: in float32 but for the last layer, whose products are those of whole numbers of 16 bits.
//
// Normalised candidates are all 8 long (sqrt(C)) at most, so one scale suits them, and the highest of a location's products
// is the highest of their whole numbers. Columns of `out` are at most 65,000 long: no sum leaves 32 bits (see
// product_panel_int16.h). 1e-4 of the largest number is what rounding takes.
#include "gather_cpu.h"
#include "vote_cpu.h"

#ifdef DMV_X86
#include <immintrin.h>

DMV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#include "lanes_avx512.h"
#include "vote_heads_avx512.h"
#include "vote_float32.h"
#include "product_panel.h"
#include "product_panel_int16.h"

namespace dmv_fast {
namespace {

constexpr float kWholeScale = kLongestRow / 8;
static_assert(kVoteWidth == 8 * 8 && kVoteRows % kRowsTogether == 0);

struct OutInt16 {
  static void run(const Float32Voting& call, int64_t first, int locations, Ahead& ahead, VoteFloat32Scratch& s) {
    alignas(64) int16_t whole[kVoteRows * kVoteWidth];
    float nothing[kVoteRows];  // of each location: NaN where a candidate is no number
    const int rows = locations * call.candidates;
    round_rows(call, locations, s, whole, nothing);
    for (int64_t column = 0; column < call.value_width; column += kColumns) {
      for (int row = 0; row < rows; row += kRowsTogether) {
        multiply_panel(
            {whole + row * kVoteWidth, kVoteWidth, kVoteWidth}, call.out_whole + column * kVoteWidth,
            [&](int r, int c, Vector sum) { Lanes::store(s.product + (row + r) * kColumns + c, sum); });
        for (int line = 0; line < kLinesAhead; ++line) ahead();
      }
      pool(call, first, locations, column, s, [&](int location, int64_t c, Vector& highest) {
        const Vector scale = Lanes::multiply(Lanes::load(call.out_scale + c), Lanes::fill(1 / kWholeScale));
        highest = Lanes::multiply_add(highest, scale, Lanes::fill(nothing[location]));
      });
    }
  }

 private:
  static constexpr int kLinesAhead = 8;  // as many as leave none over

  static void round_rows(
      const Float32Voting& call, int locations, const VoteFloat32Scratch& s, int16_t* whole, float* nothing) {
    const float* row = s.mixed;
    for (int location = 0; location < locations; ++location) {
      nothing[location] = 0.0f;
      for (int i = 0; i < call.candidates; ++i, row += kVoteWidth, whole += kVoteWidth) {
        const float scale = norm_scale(row, call.epsilon);
        nothing[location] += 0.0f / scale;  // 0 where the sum of its squares is infinite
        for (int c = 0; c < kVoteWidth; c += kWidth) {
          const __m512i x = _mm512_cvtps_epi32(Lanes::multiply(Lanes::load(row + c), Lanes::fill(scale * kWholeScale)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole + c), _mm512_cvtsepi32_epi16(x));
        }
      }
    }
  }
};

}  // namespace

VoteFloat32Locations vote_int16_avx512_vnni() { return vote_locations<OutInt16>; }

}  // namespace dmv_fast
DMV_TARGET_END
#endif
