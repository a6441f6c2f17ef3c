// dmv_fast::convolve_cpu: a convolution with bias, residual and rectifier; weights packed beforehand.
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

constexpr int64_t kBandBytes = 800 << 10;  // of the laid out input; beside it in L2 lie the weights of two blocks
constexpr int64_t kBlock = 2;              // rows of out at the least

// Threads share a crop's rows where its map is larger than the weights, else its output channels; each lays out for
// itself what it reads.
void run(Convolving& c) {
  const int64_t blocks = c.c_out / kChunk, map = c.row_step() * c.read_rows(), weight = c.per_block() * blocks;
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_rows = weight < map && c.crops % threads != 0;
  const int64_t most = std::max(kBlock, (kBandBytes / (c.row_step() * 2) - c.reach()) / c.stride + 1);
  const int64_t rows = by_rows ? (c.rows + threads - 1) / threads : c.rows;
  const int64_t bands = (rows + most - 1) / most;
  c.band = ((rows + bands - 1) / bands + kBlock - 1) / kBlock * kBlock;
  const int64_t numbers = ((c.band - 1) * c.stride + c.reach()) * c.row_step() + kSegment * c.stride * kChunk;
#ifdef DMV_X86
  const ConvolvePart kernel = convolve_amx(c.parts, c.weight_parts);
  const int64_t units = by_rows ? (c.rows + kBlock - 1) / kBlock : blocks;  // of a crop
  torch::stable::parallel_for(0, c.crops * units, 1, [&](int64_t begin, int64_t end) {
    auto* const room = static_cast<uint16_t*>(room_of(numbers * 2));
    for (int64_t last; begin < end; begin = last) {
      const int64_t crop = begin / units, from = begin - crop * units;
      last = std::min(end, (crop + 1) * units);
      const int64_t to = last - crop * units;
      kernel(
          c, by_rows ? ConvolvingPart{crop, from * kBlock, std::min(to * kBlock, c.rows), 0, blocks}
                     : ConvolvingPart{crop, 0, c.rows, from, to}, room);
    }
  });
#endif
}

void convolve_cpu(
    const Tensor& x,       // [B, H, W, C_in] bfloat16, or float32 for two or three products
    const Tensor& weight,  // packed, bfloat16, in one part or, for float32, in two; see convolution.py
    const Tensor& scale,   // [C_out] float32, as bias
    const Tensor& bias,
    Tensor out,            // [B, h, w, C_out] as x
    bool add,              // to what is in out
    bool relu, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t groups)
{
  STD_TORCH_CHECK(convolve_cpu_runs(), "convolve_cpu: this processor has no AMX, or DMV_FAST_CPU_ISA names something else");
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, "x, out: must be (B, H, W, C)");
  STD_TORCH_CHECK(
      kernel >= 1 && stride >= 1 && padding >= 0 && dilation >= 1 && groups >= 1,
      "kernel, stride, dilation and groups must be 1 or more, padding 0 or more");
  Convolving c;
  c.crops = x.size(0), c.height = x.size(1), c.width = x.size(2), c.c_in = x.size(3);
  c.kernel = kernel, c.padding = padding, c.dilation = dilation, c.groups = groups;
  c.rows = (c.height + 2 * padding - c.reach()) / stride + 1;
  c.columns = (c.width + 2 * padding - c.reach()) / stride + 1;
  c.c_out = bias.numel();
  c.skip = kernel == 1 && padding == 0 ? stride : 1;
  c.stride = stride / c.skip;
  c.add = add, c.relu = relu;
  STD_TORCH_CHECK(
      c.c_in % (groups * kChunk) == 0 && c.c_out % (groups * kChunk) == 0,
      "x, bias: their channels must be multiples of 32 in each group");
  STD_TORCH_CHECK(c.height + 2 * padding >= c.reach() && c.width + 2 * padding >= c.reach(), "x: smaller than the kernel");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: must be float32 or bfloat16");
  c.parts = dtype == ScalarType::Float ? 2 : 1;
  c.weight_parts = 1;
  if (c.parts == 2 && weight.numel() == 2 * c.per_block() * (c.c_out / kChunk)) c.weight_parts = 2;
  c.x = checked<void>(x, "x", dtype, x.numel());
  c.weight = checked<uint16_t>(weight, "weight", ScalarType::BFloat16, c.per_block() * (c.c_out / kChunk));
  c.scale = checked<float>(scale, "scale", ScalarType::Float, c.c_out);
  c.bias = checked<float>(bias, "bias", ScalarType::Float, c.c_out);
  STD_TORCH_CHECK(
      out.size(0) == c.crops && out.size(1) == c.rows && out.size(2) == c.columns, "out: must be (", c.crops, ", ",
      c.rows, ", ", c.columns, ", ", c.c_out, ")");
  checked<void>(out, "out", dtype, c.crops * c.rows * c.columns * c.c_out);
  c.out = out.mutable_data_ptr();
  if (c.crops > 0) run(c);
}

}  // namespace

bool convolve_cpu_runs() { return allowed(Isa::amx); }

}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "convolve_cpu(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor(a!) out, bool add, bool relu, int kernel,"
      " int stride, int padding, int dilation, int groups) -> ()");
  library.def("convolve_cpu_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("convolve_cpu", TORCH_BOX(&dmv_fast::convolve_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CompositeExplicitAutograd, library) {
  library.impl("convolve_cpu_runs", TORCH_BOX(&dmv_fast::convolve_cpu_runs));
}
