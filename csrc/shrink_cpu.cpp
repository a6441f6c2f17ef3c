// dmv_fast::shrink_cpu: an image made smaller by averaging areas, as cv2.resize does with INTER_AREA, to the bit.
//
// A pixel of out is the mean of what lies under it: along a row first, in the order of the pixels, then down the rows.
// A pixel's colours are the lanes of a vector, so that order stays; the fourth lane is the next pixel's and is dropped.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

typedef float Colours __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(16)));

// What each number of out is the weighted sum of: `taps` numbers and their shares, as many for all. A share may be 0.
struct Axis {
  int64_t taps;
  std::vector<int64_t> from;
  std::vector<float> share;

  Axis(int64_t length, int64_t size) : taps(0) {
    constexpr double kNothing = 1e-3;  // a share too small to count: OpenCV's
    const double scale = double(length) / double(size);
    taps = int64_t(std::ceil(scale)) + 1;
    for (int64_t i = 0; i < size; ++i) {
      const double first = double(i) * scale, end = first + scale, width = std::min(scale, double(length) - first);
      const int64_t last = std::min(int64_t(end), length - 1), whole = std::min(int64_t(std::ceil(first)), last);
      const size_t begin = from.size();
      if (double(whole) - first > kNothing) add(whole - 1, (double(whole) - first) / width);
      for (int64_t x = whole; x < last; ++x) add(x, 1 / width);
      if (end - double(last) > kNothing) add(last, std::min({end - double(last), 1.0, width}) / width);
      while (from.size() < begin + taps) add(from.back(), 0);
    }
  }

 private:
  void add(int64_t at, double part) {
    from.push_back(at);
    share.push_back(float(part));
  }
};

inline Colours load(const float* at) {
  Colours colours;
  std::memcpy(&colours, at, sizeof colours);
  return colours;
}

// One row of `numbers` bytes to sums; line: room for one number more.
void shrink_row(const uint8_t* row, int64_t numbers, const Axis& across, float* line, std::vector<Colours>& sums) {
  for (int64_t i = 0; i < numbers; ++i) line[i] = float(row[i]);
  const int64_t* from = across.from.data();
  const float* share = across.share.data();
  for (Colours& out : sums) {
    Colours sum{};
    for (int64_t tap = 0; tap < across.taps; ++tap) sum += load(line + 3 * *from++) * *share++;
    out = sum;
  }
}

void write_row(const std::vector<Colours>& sums, uint8_t* out) {
  for (const Colours& sum : sums) {
    const Colours rounded = sum + 0x1p23f;  // its last bits are the nearest whole number, the even one of two as near
    Whole bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    for (int i = 0; i < 3; ++i) *out++ = static_cast<uint8_t>(bits[i]);
  }
}

void shrink_cpu(
    const Tensor& image,  // [H, W, 3] uint8, the pixels of a row side by side
    Tensor out)           // [h, w, 3] uint8, contiguous, h <= H, w <= W
{
  STD_TORCH_CHECK(
      image.dim() == 3 && out.dim() == 3 && image.size(2) == 3 && out.size(2) == 3 && out.size(0) >= 1 &&
          out.size(1) >= 1 && out.size(0) <= image.size(0) && out.size(1) <= image.size(1),
      "image, out: must be (H, W, 3) and no larger (h, w, 3)");
  STD_TORCH_CHECK(
      image.scalar_type() == ScalarType::Byte && out.scalar_type() == ScalarType::Byte, "image, out: must be uint8");
  STD_TORCH_CHECK(
      image.stride(2) == 1 && image.stride(1) == 3 && out.is_contiguous(), "image, out: their pixels must lie side by side");
  const Axis down(image.size(0), out.size(0)), across(image.size(1), out.size(1));
  const auto* const pixels = static_cast<const uint8_t*>(image.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t numbers = image.size(1) * 3;
  std::vector<float> line(numbers + 1);
  std::vector<Colours> row(out.size(1)), sums(out.size(1));
  int64_t here = -1;  // the row of the image that `row` is made of: the last of one row of out may be the next one's first
  for (int64_t y = 0; y < out.size(0); ++y, to += out.size(1) * 3) {
    std::fill(sums.begin(), sums.end(), Colours{});
    for (int64_t tap = y * down.taps; tap < (y + 1) * down.taps && down.share[tap] > 0; ++tap) {
      if (here != down.from[tap]) {
        here = down.from[tap];
        shrink_row(pixels + here * image.stride(0), numbers, across, line.data(), row);
      }
      const float share = down.share[tap];
      for (size_t x = 0; x < sums.size(); ++x) sums[x] += row[x] * share;
    }
    write_row(sums, to);
  }
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) { library.def("shrink_cpu(Tensor image, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) { library.impl("shrink_cpu", TORCH_BOX(&dmv_fast::shrink_cpu)); }
