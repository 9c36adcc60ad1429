// What the bindings share: tensors and numbers of PyTorch as the types of the kernels, checked.
//
// A caller that skips effkernels/native.py gets an error, never a read outside a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "common/types.h"
#include "conv/conv.h"

// What errors call the library.
#if defined(EFFKERNELS_CUDA)
#define EFFKERNELS_LIBRARY "effkernels_cuda: "
#else
#define EFFKERNELS_LIBRARY "effkernels_cpu: "
#endif

namespace effkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Parallel torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(
                0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::bf16;
#if defined(EFFKERNELS_CUDA)
    case torch::headeronly::ScalarType::Half:
      return DType::f16;
#endif
    default:
      STD_TORCH_CHECK(false, EFFKERNELS_LIBRARY "a dtype that no kernel is for");
  }
}

inline void check_size(const char* name, const Tensor& tensor, int64_t wanted) {
  STD_TORCH_CHECK(tensor.numel() == wanted, EFFKERNELS_LIBRARY, name, " has ", tensor.numel(),
                  " values, ", wanted, " are accepted");
}

inline const float* floats(const char* name, const Tensor& tensor, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, EFFKERNELS_LIBRARY,
                  name, " is not float32");
  check_size(name, tensor, size);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* floats(const char* name, const OptionalTensor& tensor, int64_t size) {
  return tensor ? floats(name, *tensor, size) : nullptr;
}

inline void* writable(const char* name, const Tensor& tensor, DType dtype, int64_t size) {
  STD_TORCH_CHECK(dtype_of(tensor) == dtype, EFFKERNELS_LIBRARY, name,
                  " has another dtype than input");
  check_size(name, tensor, size);
  return tensor.mutable_data_ptr();
}

inline float* optional_floats(const char* name, const OptionalTensor& tensor, int64_t size) {
  return tensor ? static_cast<float*>(writable(name, *tensor, DType::f32, size)) : nullptr;
}

inline const void* residual_of(const OptionalTensor& tensor, DType dtype, int64_t size) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(dtype_of(*tensor) == dtype, EFFKERNELS_LIBRARY "residual has another dtype");
  check_size("residual", *tensor, size);
  return tensor->const_data_ptr();
}

inline int64_t panels_size(int64_t channels, int64_t depth) {
  return round_up(channels, kPanel) * depth;
}

// The weights of a convolution: for Winograd's algorithm as given and transformed, else in panels.
inline void set_weights(ConvArgs& args, const Tensor& weight, const OptionalTensor& transformed) {
  const Geometry& g = args.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w, depth = args.in.channels;
  if (!transformed) {
    args.weight = floats("weight", weight, panels_size(args.out_channels, taps * depth));
    return;
  }
  const bool fits = g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h == 1 && g.stride_w == 1 &&
                    g.dilation_h == 1 && g.dilation_w == 1 && !args.planar;
  STD_TORCH_CHECK(fits, EFFKERNELS_LIBRARY "conv: transformed weights are for 3x3, stride 1, NHWC");
  args.weight = floats("weight", weight, args.out_channels * taps * depth);
  args.tile_width = transformed->size(0) == 16 ? 2 : 4;
  const int64_t matrices = 4 * (args.tile_width + 2);
  args.transformed =
      floats("transformed", transformed, matrices * panels_size(args.out_channels, depth));
}

inline Images images_of(const Tensor& tensor) {  // [N, C, H, W] by shape
  return {tensor.size(0), tensor.size(2), tensor.size(3), tensor.size(1)};
}

inline Geometry geometry_of(const std::vector<int64_t>& g) {  // effkernels/native.py _geometry
  STD_TORCH_CHECK(g.size() == 8, EFFKERNELS_LIBRARY "a geometry has 8 numbers");
  for (size_t i = 0; i < g.size(); i++) {  // padding may be 0, the rest may not
    STD_TORCH_CHECK(g[i] >= (i < 6 ? 1 : 0), EFFKERNELS_LIBRARY "bad geometry");
  }
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < kActivations, EFFKERNELS_LIBRARY "unknown activation");
  return static_cast<Activation>(code);
}

inline Epilogue epilogue_of(const OptionalTensor& scale, const OptionalTensor& bias,
                            int64_t channels, int64_t activation) {
  return {floats("scale", scale, channels), floats("bias", bias, channels), nullptr,
          activation_of(activation)};
}

inline SqueezeExciteWeights gate_of(const Tensor& reduce_weight, const OptionalTensor& reduce_bias,
                                    const Tensor& expand_weight, const OptionalTensor& expand_bias,
                                    int64_t channels, int64_t activation, int64_t gate_activation) {
  const int64_t reduced = reduce_weight.size(0), size = reduced * channels;
  return {channels,
          reduced,
          floats("reduce_weight", reduce_weight, size),
          floats("reduce_bias", reduce_bias, reduced),
          floats("expand_weight", expand_weight, size),
          floats("expand_bias", expand_bias, channels),
          activation_of(activation),
          activation_of(gate_activation)};
}

// Taps of a depthwise convolution: [kernel_h * kernel_w, channels rounded up].
inline const float* taps_of(const Tensor& weight, const Geometry& g, int64_t channels) {
  return floats("weight", weight, g.kernel_h * g.kernel_w * round_up(channels, kPanel));
}

}  // namespace effkernels
