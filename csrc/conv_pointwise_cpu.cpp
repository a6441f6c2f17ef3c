// dmv_fast::convolve_pointwise_cpu: a 1 x 1 convolution with bias, residual and rectifier in float32.
// dmv_fast::convolve_pointwise_int16_cpu: the same, but for its products, of whole numbers.
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

constexpr int64_t kShare = 8;  // pixels that one thread takes: of a product
constexpr int64_t kMostStride = 1 << 20;

bool convolve_pointwise_cpu_runs() { return allowed(Isa::avx2); }

PointwisePart part_of(const Pointwise& c) {
#ifdef DMV_X86
  if (c.number == sizeof(int16_t)) return pointwise_int16();
  return allowed(Isa::avx512) ? pointwise_avx512() : pointwise_avx2();
#else
  return nullptr;
#endif
}

void run(const Pointwise& c) {
  const PointwisePart part = part_of(c);
  torch::stable::parallel_for(0, (c.pixels() + kShare - 1) / kShare, 1, [&](int64_t begin, int64_t end) {
    void* const room = room_of(kPixelStep * (c.pitch() * c.number + int64_t(sizeof(float))));
    part(c, begin * kShare, std::min(end * kShare, c.pixels()), room);
  });
}

// All of a call but its weights.
Pointwise call_of(
    const Tensor& x,     // [B, H, W, C_in] float32
    const Tensor& bias,  // [C_out]
    Tensor& out,         // [B, h, w, C_out]
    bool add,            // to what is in out
    bool relu, int64_t stride)
{
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, "x, out: must be (B, H, W, C)");
  STD_TORCH_CHECK(stride >= 1 && stride <= kMostStride, "stride: must be 1..", kMostStride);
  Pointwise c;
  c.crops = x.size(0), c.height = x.size(1), c.width = x.size(2), c.c_in = x.size(3);
  c.rows = (c.height + stride - 1) / stride, c.columns = (c.width + stride - 1) / stride;
  c.c_out = bias.numel(), c.stride = stride;
  c.add = add, c.relu = relu;
  STD_TORCH_CHECK(
      c.c_in % 16 == 0 && c.c_out % kPanel == 0, "x, bias: their channels must be multiples of 16 and of 32");
  c.x = checked<float>(x, "x", ScalarType::Float, x.numel());
  c.bias = checked<float>(bias, "bias", ScalarType::Float, c.c_out);
  STD_TORCH_CHECK(
      out.size(0) == c.crops && out.size(1) == c.rows && out.size(2) == c.columns, "out: must be (", c.crops, ", ",
      c.rows, ", ", c.columns, ", ", c.c_out, ")");
  checked<float>(out, "out", ScalarType::Float, c.pixels() * c.c_out);
  c.out = static_cast<float*>(out.mutable_data_ptr());
  STD_TORCH_CHECK(
      c.out >= c.x + x.numel() || c.x >= c.out + out.numel(), "out: must not lie in x, which is still read");
  return c;
}

void convolve_pointwise_cpu(
    const Tensor& x, const Tensor& weight,  // [C_out / 32, C_in, 32], see convolution.py
    const Tensor& bias, Tensor out, bool add, bool relu, int64_t stride)
{
  STD_TORCH_CHECK(
      convolve_pointwise_cpu_runs(), "convolve_pointwise_cpu: this processor has no AVX2, or DMV_FAST_CPU_ISA names less");
  Pointwise c = call_of(x, bias, out, add, relu, stride);
  c.weight = checked<float>(weight, "weight", ScalarType::Float, c.c_out * c.c_in);
  c.weight_scale = nullptr, c.number = sizeof(float);
  run(c);
}

void convolve_pointwise_int16_cpu(
    const Tensor& x, const Tensor& weight,  // [C_out / 32, C_in / 2, 32, 2] int16, see convolution.py
    const Tensor& scale,                    // [C_out] float32
    const Tensor& bias, Tensor out, bool add, bool relu, int64_t stride)
{
  STD_TORCH_CHECK(
      convolve_int16_cpu_runs(),
      "convolve_pointwise_int16_cpu: this processor has no AVX512_VNNI, or DMV_FAST_CPU_ISA names less");
  Pointwise c = call_of(x, bias, out, add, relu, stride);
  STD_TORCH_CHECK(c.c_in <= kMostRounded, "x: must have at most ", kMostRounded, " channels");
  c.weight = checked<int16_t>(weight, "weight", ScalarType::Short, c.c_out * c.c_in);
  c.weight_scale = checked<float>(scale, "scale", ScalarType::Float, c.c_out);
  c.number = sizeof(int16_t);
  run(c);
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "convolve_pointwise_cpu(Tensor x, Tensor weight, Tensor bias, Tensor(a!) out, bool add, bool relu, int stride) -> ()");
  library.def("convolve_pointwise_cpu_runs() -> bool");
  library.def(
      "convolve_pointwise_int16_cpu(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor(a!) out, bool add, bool relu,"
      " int stride) -> ()");
  library.def("convolve_pointwise_int16_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("convolve_pointwise_cpu", TORCH_BOX(&dmv_fast::convolve_pointwise_cpu));
  library.impl("convolve_pointwise_int16_cpu", TORCH_BOX(&dmv_fast::convolve_pointwise_int16_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("convolve_pointwise_cpu_runs", TORCH_BOX(&dmv_fast::convolve_pointwise_cpu_runs));
  library.impl("convolve_pointwise_int16_cpu_runs", TORCH_BOX(&dmv_fast::convolve_int16_cpu_runs));
}
