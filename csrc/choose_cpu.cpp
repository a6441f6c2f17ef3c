// dmv_fast::choose_box_cpu: which predicted box is the target (dmv_fast/model/pick.py), from the head's answer.
//
//   s      = sigmoid(logit),    box = anchor moved and scaled by its deltas
//   change = max(r, 1 / r) of the scale r to the last, times the same of the ratio
//   rank   = s * exp(-(change - 1) p) (1 - w) + window * w,    p, w: PickConfig.size_penalty, .window
//
// The highest rank is chosen; its size moves from the last one by `smoothing` * s * penalty. A thousand boxes take some
// 30 us: plain code, one thread a target.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "checked.h"

namespace dmv_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kMostLog = 4;  // vision/boxes.py: decode

struct Terms {
  float size_penalty, window, smoothing;
};

struct Box {
  float cx, cy, w, h, score, penalty;
};

float larger(float ratio) { return std::max(ratio, 1 / ratio); }

float scale(float w, float h) {
  const float p = (w + h) / 2;
  return std::sqrt((w + p) * (h + p));
}

// One target's maps. Steps in elements: of logits from an anchor and a location to the next, of deltas from one of an
// anchor's four as well.
struct Maps {
  const float *logits, *deltas, *anchors, *window;
  int64_t logit_anchor, logit_row, logit_column, delta_anchor, delta_kind, delta_row, delta_column;
  int64_t count, height, width;
};

// scores [A, H, W]: all are written. answer [5].
void choose(const Maps& maps, const float* last, const Terms& terms, float* scores, float* answer) {
  const float last_scale = scale(last[0], last[1]), last_ratio = last[0] / last[1];
  float highest = -HUGE_VALF;
  Box best{};
  int64_t i = 0;
  for (int64_t a = 0; a < maps.count; ++a)
    for (int64_t y = 0; y < maps.height; ++y)
      for (int64_t x = 0; x < maps.width; ++x, ++i) {
        const float logit = maps.logits[a * maps.logit_anchor + y * maps.logit_row + x * maps.logit_column];
        const float* delta = maps.deltas + a * maps.delta_anchor + y * maps.delta_row + x * maps.delta_column;
        const float* anchor = maps.anchors + 4 * i;
        const auto log_size = [&](int kind) {
          return std::clamp(delta[kind * maps.delta_kind], -kMostLog, kMostLog);
        };
        Box box;
        box.score = scores[i] = 1 / (1 + std::exp(-logit));
        box.w = anchor[2] * std::exp(log_size(2)), box.h = anchor[3] * std::exp(log_size(3));
        const float change = larger(scale(box.w, box.h) / last_scale) * larger(box.w / box.h / last_ratio);
        box.penalty = std::exp(-(change - 1) * terms.size_penalty);
        const float rank = box.score * box.penalty * (1 - terms.window) + maps.window[i] * terms.window;
        if ((i > 0 && rank <= highest) || highest != highest) continue;  // NaN is the highest, as torch.argmax has it
        highest = rank;
        box.cx = anchor[0] + anchor[2] / 2 + delta[0] * anchor[2];
        box.cy = anchor[1] + anchor[3] / 2 + delta[maps.delta_kind] * anchor[3];
        best = box;
      }
  if (terms.smoothing < 1) {
    const float rate = best.penalty * best.score * terms.smoothing;
    best.w = last[0] + (best.w - last[0]) * rate;
    best.h = last[1] + (best.h - last[1]) * rate;
  }
  answer[0] = best.cx - best.w / 2, answer[1] = best.cy - best.h / 2;
  answer[2] = best.w, answer[3] = best.h, answer[4] = best.score;
}

std::tuple<Tensor, Tensor> choose_box_cpu(
    const Tensor& logits,   // [n, A, H, W] float32, of any strides
    const Tensor& deltas,   // [n, A, 4, H, W] float32, of any strides
    const Tensor& anchors,  // [A, H, W, 4] float32 xywh, contiguous
    const Tensor& window,   // [A, H, W] float32, contiguous
    const Tensor& sizes,    // [n, 2] float32, contiguous: the last width and height
    double size_penalty, double window_share, double smoothing) {
  STD_TORCH_CHECK(logits.dim() == 4 && deltas.dim() == 5, "logits, deltas: must be (n, A, H, W) and (n, A, 4, H, W)");
  const int64_t n = logits.size(0), count = logits.size(1), height = logits.size(2), width = logits.size(3);
  STD_TORCH_CHECK(
      deltas.size(0) == n && deltas.size(1) == count && deltas.size(2) == 4 && deltas.size(3) == height &&
          deltas.size(4) == width,
      "deltas: must be (n, A, 4, H, W) of the logits' (n, A, H, W)");
  STD_TORCH_CHECK(
      logits.scalar_type() == ScalarType::Float && deltas.scalar_type() == ScalarType::Float,
      "logits, deltas: must be float32");
  const int64_t boxes = count * height * width;
  STD_TORCH_CHECK(boxes > 0, "logits: there must be a box to choose");
  Maps all{};
  all.anchors = checked<float>(anchors, "anchors", ScalarType::Float, boxes * 4);
  all.window = checked<float>(window, "window", ScalarType::Float, boxes);
  const float* last = checked<float>(sizes, "sizes", ScalarType::Float, n * 2);
  all.logit_anchor = logits.stride(1), all.logit_row = logits.stride(2), all.logit_column = logits.stride(3);
  all.delta_anchor = deltas.stride(1), all.delta_kind = deltas.stride(2), all.delta_row = deltas.stride(3);
  all.delta_column = deltas.stride(4);
  all.count = count, all.height = height, all.width = width;
  const Terms terms{float(size_penalty), float(window_share), float(smoothing)};

  Tensor answer = torch::stable::new_empty(logits, {n, 5});
  Tensor scores = torch::stable::new_empty(logits, {n, count, height, width});
  const auto* const logit = static_cast<const float*>(logits.const_data_ptr());
  const auto* const delta = static_cast<const float*>(deltas.const_data_ptr());
  auto* const answers = static_cast<float*>(answer.mutable_data_ptr());
  auto* const written = static_cast<float*>(scores.mutable_data_ptr());
  torch::stable::parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Maps maps = all;
      maps.logits = logit + i * logits.stride(0), maps.deltas = delta + i * deltas.stride(0);
      choose(maps, last + 2 * i, terms, written + i * boxes, answers + 5 * i);
    }
  });
  return {answer, scores};
}

}  // namespace
}  // namespace dmv_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dmv_fast, library) {
  library.def(
      "choose_box_cpu(Tensor logits, Tensor deltas, Tensor anchors, Tensor window, Tensor sizes, float size_penalty,"
      " float window_share, float smoothing) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dmv_fast, CPU, library) {
  library.impl("choose_box_cpu", TORCH_BOX(&dmv_fast::choose_box_cpu));
}
