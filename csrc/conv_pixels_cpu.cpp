// dmv_fast::convolve_pixels_cpu: pixels to conv1, rectifier and max pool in one go; weights packed beforehand.
#include "checked.h"
#include "conv_cpu.h"
#include "room.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void convolve_pixels_cpu(
    const Tensor& crops,   // [B, H, W, 3] uint8
    const Tensor& weight,  // packed, bfloat16, with as many parts as out asks for; see pixels.py
    const Tensor& bias,    // [C] float32
    const Tensor& mean,    // [3] float32
    Tensor out)            // [B, H / 4, W / 4, C] bfloat16, or float32 for weights in two parts
{
  STD_TORCH_CHECK(convolve_cpu_runs(), "convolve_pixels_cpu: this processor has no AMX, or DMV_FAST_CPU_ISA names something else");
  STD_TORCH_CHECK(
      crops.dim() == 4 && crops.size(1) % 4 == 0 && crops.size(2) % 64 == 0 && crops.size(3) == 3,
      "crops: must be (B, H, W, 3), H a multiple of 4 and W of 64");
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "out: must be float32 or bfloat16");
  PixelConvolving c;
  c.height = crops.size(1), c.width = crops.size(2), c.c_out = bias.numel();
  c.parts = dtype == ScalarType::Float ? 2 : 1;
  STD_TORCH_CHECK(c.c_out % kChunk == 0, "bias: its length must be a multiple of 32");
  const int64_t batch = crops.size(0), rows = c.height / 4;
  c.crops = checked<uint8_t>(crops, "crops", ScalarType::Byte, crops.numel());
  c.weight = checked<uint16_t>(
      weight, "weight", ScalarType::BFloat16, c.c_out / kChunk * 7 * c.parts * 2 * kTileNumbers);
  c.bias = checked<float>(bias, "bias", ScalarType::Float, c.c_out);
  c.mean = checked<float>(mean, "mean", ScalarType::Float, 3);
  checked<void>(out, "out", dtype, batch * rows * (c.width / 4) * c.c_out);
  c.out = out.mutable_data_ptr();
#ifdef DMV_X86
  const ConvolvePixels kernel = convolve_pixels_amx(c.parts);
  torch::stable::parallel_for(0, batch * rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t last; begin < end; begin = last) {
      const int64_t crop = begin / rows;
      last = std::min({end, (crop + 1) * rows, begin + 16});  // few enough that the pixels stay in L1 and L2
      const int64_t sums = 3 * c.width / 2 * c.c_out * 2;     // float32
      const int64_t numbers = c.read_rows(last - begin) * c.row_numbers() + sums;
      auto* const room = static_cast<uint16_t*>(room_of(numbers * 2));
      kernel(c, crop, begin - crop * rows, last - crop * rows, room);
    }
  });
#endif
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def("convolve_pixels_cpu(Tensor crops, Tensor weight, Tensor bias, Tensor mean, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("convolve_pixels_cpu", TORCH_BOX(&dmv_fast::convolve_pixels_cpu));
}
