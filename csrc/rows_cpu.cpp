// What is done to rows of features between convolutions (dmv_fast/runtime/rows.py), in float32:
//
//   join_rows_cpu         out = [left, right] / sqrt(mean of their squares + eps)      (paper section 3.1)
//   rows_with_length_cpu  out = x * length / |x|                                       (cosine similarity)
//
// The arithmetic is next to nothing: what counts is that it is one call and one pass, not seven.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsAThread = 64;  // of 256 numbers: below it, waking a thread costs more than it saves

float sum_of_squares(const float* x, int64_t count) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  for (; i < count; ++i) lanes[0] += x[i] * x[i];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

void scale(const float* x, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

bool same_rows(const Tensor& a, const Tensor& b) {
  return a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.size(2) == b.size(2);
}

void join_rows_cpu(
    const Tensor& left,   // [B, H, W, D / 2], contiguous
    const Tensor& right,  // [B, H, W, D / 2], contiguous
    Tensor out,           // [B, H, W, D], rows contiguous and evenly spaced
    double epsilon)       // added to the mean square; less than 0: rows are joined as they are
{
  STD_TORCH_CHECK(
      left.dim() == 4 && right.dim() == 4 && out.dim() == 4 && same_rows(left, right) && same_rows(left, out) &&
          left.size(3) == right.size(3) && out.size(3) == 2 * left.size(3),
      "left, right, out: must be (B, H, W, D / 2), the same and (B, H, W, D)");
  STD_TORCH_CHECK(is_float(left) && is_float(right) && is_float(out), "left, right, out: must be float32");
  STD_TORCH_CHECK(
      left.is_contiguous() && right.is_contiguous() && out.stride(3) == 1 && out.stride(2) >= out.size(3) &&
          (out.size(1) == 1 || out.stride(1) == out.size(2) * out.stride(2)) &&
          (out.size(0) == 1 || out.stride(0) == out.size(1) * out.size(2) * out.stride(2)),
      "left, right, out: rows must be contiguous, out's evenly spaced");
  const int64_t half = left.size(3), width = 2 * half, step = out.stride(2);
  const auto* const from_left = static_cast<const float*>(left.const_data_ptr());
  const auto* const from_right = static_cast<const float*>(right.const_data_ptr());
  auto* const to = static_cast<float*>(out.mutable_data_ptr());
  if (width == 0) return;
  torch::stable::parallel_for(0, out.numel() / width, kRowsAThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *l = from_left + row * half, *r = from_right + row * half;
      float factor = 1;
      if (epsilon >= 0) {
        const float mean = (sum_of_squares(l, half) + sum_of_squares(r, half)) / float(width);
        factor = 1 / std::sqrt(mean + float(epsilon));
      }
      scale(l, factor, half, to + row * step);
      scale(r, factor, half, to + row * step + half);
    }
  });
}

Tensor rows_with_length_cpu(
    const Tensor& rows,  // [B, M, D], rows contiguous
    double length) {
  STD_TORCH_CHECK(
      rows.dim() == 3 && is_float(rows) && (rows.stride(2) == 1 || rows.size(2) <= 1),
      "rows: must be (B, M, D), float32, each contiguous");
  const int64_t count = rows.size(1), width = rows.size(2);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), count, width});
  const auto* const from = static_cast<const float*>(rows.const_data_ptr());
  auto* const to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.size(0) * count, kRowsAThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = from + row / count * rows.stride(0) + row % count * rows.stride(1);
      const float norm = std::sqrt(sum_of_squares(x, width));
      scale(x, float(length) / std::max(norm, 1e-12f), width, to + row * width);
    }
  });
  return out;
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def("join_rows_cpu(Tensor left, Tensor right, Tensor(a!) out, float epsilon) -> ()");
  library.def("rows_with_length_cpu(Tensor rows, float length) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("join_rows_cpu", TORCH_BOX(&dmv_fast::join_rows_cpu));
  library.impl("rows_with_length_cpu", TORCH_BOX(&dmv_fast::rows_with_length_cpu));
}
