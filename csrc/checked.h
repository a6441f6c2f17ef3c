// A tensor's memory, once it is what a kernel takes it for.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace dmv_fast {

template <class Number>
const Number* checked(
    const torch::stable::Tensor& tensor, const char* name, torch::headeronly::ScalarType dtype, int64_t size) {
  using torch::headeronly::ScalarType;
  const char* const wanted = dtype == ScalarType::Float ? "float32"
      : dtype == ScalarType::Byte                       ? "uint8"
      : dtype == ScalarType::Short                      ? "int16"
                                                        : "bfloat16";
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == size, name, ": must be contiguous ",
      wanted, " of ", size, " elements");
  return static_cast<const Number*>(tensor.const_data_ptr());
}

}  // namespace dmv_fast
