// dmv_fast::convolve_pixels_float32_cpu: pixels to conv1, rectifier and max pool in one go, in float32.
#include "checked.h"
#include "conv_float32.h"
#include "room.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kShare = 8;  // rows of out that a thread takes at least: each share makes up to four rows of sums twice

bool convolve_pixels_float32_cpu_runs() { return allowed(Isa::avx2); }

PixelsPart part_of_call() {
#ifdef DMV_X86
  return allowed(Isa::avx512) ? pixels_avx512() : pixels_avx2();
#else
  return nullptr;
#endif
}

void convolve_pixels_float32_cpu(
    const Tensor& crops,   // [B, H, W, 3] uint8
    const Tensor& weight,  // [C / 32, kPixelPoints x 7 x 3, 32] float32, see pixels.py
    const Tensor& bias,    // [C]
    const Tensor& mean,    // [3]
    Tensor out)            // [B, H / 4, W / 4, C]
{
  STD_TORCH_CHECK(
      convolve_pixels_float32_cpu_runs(),
      "convolve_pixels_float32_cpu: this processor has no AVX2, or DMV_FAST_CPU_ISA names less");
  STD_TORCH_CHECK(
      crops.dim() == 4 && crops.size(1) % 4 == 0 && crops.size(2) % 16 == 0 && crops.size(2) > 0 && crops.size(3) == 3,
      "crops: must be (B, H, W, 3), H a multiple of 4 and W of 16");
  PixelsFloat32 c;
  c.height = crops.size(1), c.width = crops.size(2), c.c_out = bias.numel();
  STD_TORCH_CHECK(c.c_out % kPanel == 0, "bias: its length must be a multiple of 32");
  const int64_t batch = crops.size(0), rows = c.height / 4;
  c.crops = checked<uint8_t>(crops, "crops", ScalarType::Byte, crops.numel());
  c.weight = checked<float>(weight, "weight", ScalarType::Float, c.c_out * kPixelPoints * 7 * 3);
  c.bias = checked<float>(bias, "bias", ScalarType::Float, c.c_out);
  c.mean = checked<float>(mean, "mean", ScalarType::Float, 3);
  checked<float>(out, "out", ScalarType::Float, batch * rows * (c.width / 4) * c.c_out);
  c.out = static_cast<float*>(out.mutable_data_ptr());
  const PixelsPart part = part_of_call();
  torch::stable::parallel_for(0, batch * rows, kShare, [&](int64_t begin, int64_t end) {
    for (int64_t last; begin < end; begin = last) {
      const int64_t crop = begin / rows;
      last = std::min(end, (crop + 1) * rows);
      auto* const room = static_cast<float*>(room_of(c.room_numbers() * int64_t(sizeof(float))));
      part(c, crop, begin - crop * rows, last - crop * rows, room);
    }
  });
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def("convolve_pixels_float32_cpu(Tensor crops, Tensor weight, Tensor bias, Tensor mean, Tensor(a!) out) -> ()");
  library.def("convolve_pixels_float32_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("convolve_pixels_float32_cpu", TORCH_BOX(&dmv_fast::convolve_pixels_float32_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("convolve_pixels_float32_cpu_runs", TORCH_BOX(&dmv_fast::convolve_pixels_float32_cpu_runs));
}
