// dmv_fast::convolve_winograd_cpu: a 3 x 3 convolution with bias, residual and rectifier in float32; weights transformed
// beforehand. dmv_fast::convolve_winograd_int16_cpu: the same, but for its products, of whole numbers.
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

constexpr int64_t kMost = 1 << 20;          // of what a convolution is told
constexpr int64_t kSmallWeights = 3 << 20;  // bytes: those that block after block may read, from L2 and L3
constexpr int64_t kOwnRoom = 640 << 10;     // bytes of points and sums a thread, then: they stay in its L2 ...
constexpr int64_t kSharedRoom = 8 << 20;    // ... and that all threads share where weights are read once

bool convolve_winograd_cpu_runs() { return allowed(Isa::avx2); }

WinogradSteps steps_of(const Winograd& c) {
#ifdef DMV_X86
  if (c.number == sizeof(int16_t)) return winograd_int16(c.stride);
  return allowed(Isa::avx512) ? winograd_avx512(c.stride) : winograd_avx2(c.stride);
#else
  return {};
#endif
}

// Room for as many tiles as fit into so many bytes, from the calling thread's own, and for so many parts of the work.
void make_room(Winograd& c, int64_t tiles, int64_t bytes, int64_t parts) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t a_tile = c.points_of_all() * (c.pitch_in() * c.number + c.pitch_out() * kFloat);
  c.together = std::min(tiles, std::max(kTileStep, bytes / a_tile / kTileStep * kTileStep));
  const int64_t sums = c.points_of_all() * c.plane_out(), points = c.points_of_all() * c.plane_in() * c.number / kFloat;
  const int64_t scales = c.points_of_all() * c.together, rounding = parts * c.rounding_of_part();
  float* room = static_cast<float*>(room_of((points + sums + rounding + scales + c.c_in) * kFloat));
  c.points = room;
  c.sums = room += points;
  c.rounding = room += sums;
  c.point_scale = room += rounding;
  c.zeros = room += scales;
  std::fill_n(room, c.c_in, 0.0f);
}

// A thread takes its tiles all the way, some at a time.
void run_by_tiles(const Winograd& call, const WinogradSteps& step, int64_t tiles) {
  torch::stable::parallel_for(0, tiles / kTileStep, 1, [&](int64_t begin, int64_t end) {
    Winograd c = call;
    const int64_t units = c.points_of_all() * (c.c_out / kPanel), last = end * kTileStep;
    make_room(c, last - begin * kTileStep, kOwnRoom, 1);
    for (int64_t from = begin * kTileStep, until; from < last; from = until) {
      until = std::min(from + c.together, last);
      step.tiles_to_points(c, from, until, from, 0);
      step.multiply_points(c, 0, units, until - from);
      step.points_to_tiles(c, from, std::min(until, c.tiles()), from);
    }
  });
}

// All threads work on the same tiles, step by step, so that each weight is read once.
void run_by_steps(Winograd& c, const WinogradSteps& step, int64_t tiles) {
  const int64_t parts = torch::stable::get_num_threads();
  make_room(c, tiles, kSharedRoom, parts);
  for (int64_t from = 0, until; from < tiles; from = until) {
    until = std::min(from + c.together, tiles);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        const int64_t first = from + (until - from) * part / parts, last = from + (until - from) * (part + 1) / parts;
        step.tiles_to_points(c, first, last, from, part);
      }
    });
    torch::stable::parallel_for(0, c.points_of_all() * (c.c_out / kPanel), 1, [&](int64_t first, int64_t last) {
      step.multiply_points(c, first, last, until - from);
    });
    torch::stable::parallel_for(from, std::min(until, c.tiles()), 1, [&](int64_t first, int64_t last) {
      step.points_to_tiles(c, first, last, from);
    });
  }
}

void run(Winograd& c) {
  const int64_t tiles = (c.tiles() + kTileStep - 1) / kTileStep * kTileStep;
  const bool small = kWeights * c.c_out * (c.c_in / c.groups) * c.number <= kSmallWeights;
  if (small)
    run_by_tiles(c, steps_of(c), tiles);
  else
    run_by_steps(c, steps_of(c), tiles);
}

// All of a call but its weights.
Winograd call_of(
    const Tensor& x,     // [B, H, W, C_in] float32
    const Tensor& bias,  // [C_out]
    Tensor& out,         // [B, h, w, C_out]
    bool add,            // to what is in out
    bool relu, int64_t stride, int64_t padding, int64_t dilation, int64_t groups)
{
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, "x, out: must be (B, H, W, C)");
  STD_TORCH_CHECK(
      padding >= 0 && padding <= kMost && dilation >= 1 && dilation <= kMost && groups >= 1 && groups <= kMost,
      "dilation and groups must be 1 or more, padding 0 or more, none over ", kMost);
  STD_TORCH_CHECK(stride == 1 || (stride == 2 && dilation == 1), "stride: must be 1, or 2 without dilation");
  Winograd c;
  c.crops = x.size(0), c.height = x.size(1), c.width = x.size(2), c.c_in = x.size(3);
  c.c_out = bias.numel(), c.groups = groups;
  c.stride = stride, c.padding = padding, c.dilation = dilation;
  const int64_t beyond = 2 * padding - 2 * dilation - 1;
  STD_TORCH_CHECK(c.height + beyond >= 0 && c.width + beyond >= 0, "x: smaller than the kernel");
  c.rows = (c.height + beyond) / stride + 1, c.columns = (c.width + beyond) / stride + 1;
  c.add = add, c.relu = relu;
  STD_TORCH_CHECK(
      c.c_in % (16 * groups) == 0 && c.c_out % (kPanel * groups) == 0,
      "x, bias: their channels must be multiples of 16 and of 32 in each group");
  c.x = checked<float>(x, "x", ScalarType::Float, x.numel());
  c.bias = checked<float>(bias, "bias", ScalarType::Float, c.c_out);
  STD_TORCH_CHECK(
      out.size(0) == c.crops && out.size(1) == c.rows && out.size(2) == c.columns, "out: must be (", c.crops, ", ",
      c.rows, ", ", c.columns, ", ", c.c_out, ")");
  checked<float>(out, "out", ScalarType::Float, c.crops * c.rows * c.columns * c.c_out);
  c.out = static_cast<float*>(out.mutable_data_ptr());
  STD_TORCH_CHECK(
      c.out >= c.x + x.numel() || c.x >= c.out + out.numel(), "out: must not lie in x, which is still read");
  return c;
}

void convolve_winograd_cpu(
    const Tensor& x, const Tensor& weight,  // [36, C_out / 32, C_in / groups, 32], see convolution.py
    const Tensor& bias, Tensor out, bool add, bool relu, int64_t stride, int64_t padding, int64_t dilation, int64_t groups)
{
  STD_TORCH_CHECK(
      convolve_winograd_cpu_runs(), "convolve_winograd_cpu: this processor has no AVX2, or DMV_FAST_CPU_ISA names less");
  Winograd c = call_of(x, bias, out, add, relu, stride, padding, dilation, groups);
  c.weight = checked<float>(weight, "weight", ScalarType::Float, kWeights * c.c_out * (c.c_in / c.groups));
  c.weight_scale = nullptr, c.number = sizeof(float);
  if (c.crops > 0) run(c);
}

void convolve_winograd_int16_cpu(
    const Tensor& x, const Tensor& weight,  // [36, C_out / 32, C_in / 2, 32, 2] int16, see convolution.py
    const Tensor& scale,                    // [36, C_out] float32
    const Tensor& bias, Tensor out, bool add, bool relu, int64_t stride, int64_t padding, int64_t dilation)
{
  STD_TORCH_CHECK(
      convolve_int16_cpu_runs(),
      "convolve_winograd_int16_cpu: this processor has no AVX512_VNNI, or DMV_FAST_CPU_ISA names less");
  Winograd c = call_of(x, bias, out, add, relu, stride, padding, dilation, 1);
  STD_TORCH_CHECK(c.c_in <= kMostRounded, "x: must have at most ", kMostRounded, " channels");
  c.weight = checked<int16_t>(weight, "weight", ScalarType::Short, kWeights * c.c_out * c.c_in);
  c.weight_scale = checked<float>(scale, "scale", ScalarType::Float, kWeights * c.c_out);
  c.number = sizeof(int16_t);
  if (c.crops > 0) run(c);
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "convolve_winograd_cpu(Tensor x, Tensor weight, Tensor bias, Tensor(a!) out, bool add, bool relu, int stride,"
      " int padding, int dilation, int groups) -> ()");
  library.def("convolve_winograd_cpu_runs() -> bool");
  library.def(
      "convolve_winograd_int16_cpu(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor(a!) out, bool add, bool relu,"
      " int stride, int padding, int dilation) -> ()");
  library.def("convolve_winograd_int16_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("convolve_winograd_cpu", TORCH_BOX(&dmv_fast::convolve_winograd_cpu));
  library.impl("convolve_winograd_int16_cpu", TORCH_BOX(&dmv_fast::convolve_winograd_int16_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("convolve_winograd_cpu_runs", TORCH_BOX(&dmv_fast::convolve_winograd_cpu_runs));
  library.impl("convolve_winograd_int16_cpu_runs", TORCH_BOX(&dmv_fast::convolve_int16_cpu_runs));
}
