// effkernels_cpu::mbconv_training_<stage>: the stages of a block in training as PyTorch ops.
//
// A norm is one tensor [4, channels]: mean, var, weight, bias; none means that there is no norm.
#include "mbconv_training/mbconv_training.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/arguments.h"

namespace effkernels {
namespace {

float* written_floats(const char* name, const Tensor& tensor, int64_t size) {
  return static_cast<float*>(writable(name, tensor, DType::f32, size));
}

TrainingNorm norm_of(const OptionalTensor& norm, int64_t channels, double eps, int64_t activation) {
  const float* p = floats("norm", norm, 4 * channels);
  if (p == nullptr) return {nullptr, nullptr, nullptr, nullptr, eps, Activation::none};
  return {p, p + channels, p + 2 * channels, p + 3 * channels, eps, activation_of(activation)};
}

// Images of the input's dtype and of `size` values.
const void* images(const char* name, const OptionalTensor& tensor, DType dtype, int64_t size) {
  return tensor ? writable(name, *tensor, dtype, size) : nullptr;
}

void mbconv_training_product(Tensor output, Tensor mean, Tensor var, Tensor input,
                             OptionalTensor norm, OptionalTensor gate, Tensor weight, double eps,
                             int64_t activation) {
  TrainingProductArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_channels = output.size(1);
  const int64_t pixels = args.in.count * args.in.pixels(), channels = args.in.channels;
  args.output = writable("output", output, args.dtype, pixels * args.out_channels);
  args.mean = written_floats("mean", mean, args.out_channels);
  args.var = written_floats("var", var, args.out_channels);
  args.norm = norm_of(norm, channels, eps, activation);
  args.gate = floats("gate", gate, args.in.count * channels);
  args.weight = floats("weight", weight, panels_size(args.out_channels, channels));
  args.parallel = torch_threads();
  mbconv_training_product_cpu(args);
}

void mbconv_training_depthwise(Tensor output, Tensor mean, Tensor var, Tensor input,
                               OptionalTensor norm, Tensor weight, std::vector<int64_t> geometry,
                               double eps, int64_t activation) {
  TrainingDepthwiseArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_height = output.size(2);
  args.out_width = output.size(3);
  const int64_t channels = args.in.channels;
  args.output = writable("output", output, args.dtype,
                         args.in.count * args.out_height * args.out_width * channels);
  args.mean = written_floats("mean", mean, channels);
  args.var = written_floats("var", var, channels);
  args.norm = norm_of(norm, channels, eps, activation);
  args.geometry = geometry_of(geometry);
  args.weight = taps_of(weight, args.geometry, channels);
  args.parallel = torch_threads();
  mbconv_training_depthwise_cpu(args);
}

void mbconv_training_pool(Tensor pooled, Tensor input, Tensor norm, double eps,
                          int64_t activation) {
  TrainingPoolArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.pooled = written_floats("pooled", pooled, args.in.count * args.in.channels);
  args.norm = norm_of(norm, args.in.channels, eps, activation);
  args.parallel = torch_threads();
  mbconv_training_pool_cpu(args);
}

void mbconv_training_finish(Tensor output, Tensor input, Tensor norm, OptionalTensor keep,
                            OptionalTensor residual, double eps) {
  TrainingFinishArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  const int64_t values = args.in.count * args.in.size();
  args.output = writable("output", output, args.dtype, values);
  args.norm = norm_of(norm, args.in.channels, eps, static_cast<int64_t>(Activation::none));
  args.keep = floats("keep", keep, args.in.count);
  args.residual = residual_of(residual, args.dtype, values);
  args.parallel = torch_threads();
  mbconv_training_finish_cpu(args);
}

void mbconv_training_norm_backward(Tensor coefficients, OptionalTensor weight_gradient,
                                   OptionalTensor bias_gradient, Tensor upstream, Tensor input,
                                   Tensor norm, OptionalTensor keep, double eps) {
  TrainingNormBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  const int64_t channels = args.in.channels;
  args.upstream = images("upstream", upstream, args.dtype, args.in.count * args.in.size());
  args.coefficients = written_floats("coefficients", coefficients, 3 * channels);
  args.weight_gradient = optional_floats("weight_gradient", weight_gradient, channels);
  args.bias_gradient = optional_floats("bias_gradient", bias_gradient, channels);
  args.norm = norm_of(norm, channels, eps, static_cast<int64_t>(Activation::none));
  args.keep = floats("keep", keep, args.in.count);
  args.parallel = torch_threads();
  mbconv_training_norm_backward_cpu(args);
}

void mbconv_training_product_backward(OptionalTensor input_gradient, OptionalTensor weight_gradient,
                                      OptionalTensor sums, Tensor upstream, Tensor output,
                                      Tensor output_mean, Tensor coefficients, OptionalTensor keep,
                                      Tensor input, OptionalTensor norm, OptionalTensor gate,
                                      Tensor weight, OptionalTensor residual, double eps,
                                      int64_t activation) {
  TrainingProductBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_channels = output.size(1);
  const int64_t pixels = args.in.count * args.in.pixels(), channels = args.in.channels;
  if (input_gradient) {
    args.input_gradient =
        writable("input_gradient", *input_gradient, args.dtype, pixels * channels);
  }
  args.weight_gradient =
      optional_floats("weight_gradient", weight_gradient, args.out_channels * channels);
  args.sums = optional_floats("sums", sums, args.in.count * kProductSums * channels);
  STD_TORCH_CHECK(!sums || (input_gradient && norm),
                  EFFKERNELS_LIBRARY "mbconv_training: sums need input_gradient and norm");
  args.upstream = images("upstream", upstream, args.dtype, pixels * args.out_channels);
  args.output = images("output", output, args.dtype, pixels * args.out_channels);
  args.output_mean = floats("output_mean", output_mean, args.out_channels);
  args.coefficients = floats("coefficients", coefficients, 3 * args.out_channels);
  args.keep = floats("keep", keep, args.in.count);
  args.norm = norm_of(norm, channels, eps, activation);
  args.gate = floats("gate", gate, args.in.count * channels);
  args.weight = floats("weight", weight, panels_size(channels, args.out_channels));
  args.residual = residual_of(residual, args.dtype, pixels * channels);
  args.parallel = torch_threads();
  mbconv_training_product_backward_cpu(args);
}

void mbconv_training_depthwise_backward(
    OptionalTensor input_gradient, OptionalTensor weight_gradient, OptionalTensor coefficients,
    OptionalTensor norm_weight_gradient, OptionalTensor norm_bias_gradient,
    OptionalTensor output_norm_weight_gradient, OptionalTensor output_norm_bias_gradient,
    Tensor upstream, Tensor output, Tensor output_norm, Tensor sums, OptionalTensor gate,
    OptionalTensor offset, Tensor input, OptionalTensor norm, Tensor weight,
    OptionalTensor residual, std::vector<int64_t> geometry, std::vector<double> eps,
    int64_t activation) {
  STD_TORCH_CHECK(eps.size() == 2, EFFKERNELS_LIBRARY "mbconv_training: two eps are accepted");
  TrainingDepthwiseBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_height = output.size(2);
  args.out_width = output.size(3);
  const int64_t channels = args.in.channels, values = args.in.count * args.in.size();
  const int64_t outputs = args.in.count * args.out_height * args.out_width * channels;
  args.geometry = geometry_of(geometry);
  const int64_t taps = args.geometry.kernel_h * args.geometry.kernel_w;
  if (input_gradient) {
    args.input_gradient = writable("input_gradient", *input_gradient, args.dtype, values);
  }
  args.weight_gradient = optional_floats("weight_gradient", weight_gradient, taps * channels);
  args.coefficients = optional_floats("coefficients", coefficients, 3 * channels);
  STD_TORCH_CHECK(!coefficients || (input_gradient && norm),
                  EFFKERNELS_LIBRARY "mbconv_training: coefficients need input_gradient and norm");
  args.norm_weight_gradient =
      optional_floats("norm_weight_gradient", norm_weight_gradient, channels);
  args.norm_bias_gradient = optional_floats("norm_bias_gradient", norm_bias_gradient, channels);
  args.output_norm_weight_gradient =
      optional_floats("output_norm_weight_gradient", output_norm_weight_gradient, channels);
  args.output_norm_bias_gradient =
      optional_floats("output_norm_bias_gradient", output_norm_bias_gradient, channels);
  args.upstream = images("upstream", upstream, args.dtype, outputs);
  args.output = images("output", output, args.dtype, outputs);
  args.output_norm = norm_of(output_norm, channels, eps[0], activation);
  args.sums = floats("sums", sums, args.in.count * kProductSums * channels);
  args.gate = floats("gate", gate, args.in.count * channels);
  args.offset = floats("offset", offset, args.in.count * channels);
  args.norm = norm_of(norm, channels, eps[1], activation);
  args.weight = taps_of(weight, args.geometry, channels);
  args.residual = residual_of(residual, args.dtype, values);
  args.parallel = torch_threads();
  mbconv_training_depthwise_backward_cpu(args);
}

}  // namespace
}  // namespace effkernels

STABLE_TORCH_LIBRARY_FRAGMENT(effkernels_cpu, m) {
  m.def(
      "mbconv_training_product(Tensor(a!) output, Tensor(b!) mean, Tensor(c!) var, Tensor input, "
      "Tensor? norm, Tensor? gate, Tensor weight, float eps, int activation) -> ()");
  m.def(
      "mbconv_training_depthwise(Tensor(a!) output, Tensor(b!) mean, Tensor(c!) var, "
      "Tensor input, Tensor? norm, Tensor weight, int[] geometry, float eps, int activation) "
      "-> ()");
  m.def(
      "mbconv_training_pool(Tensor(a!) pooled, Tensor input, Tensor norm, float eps, "
      "int activation) -> ()");
  m.def(
      "mbconv_training_finish(Tensor(a!) output, Tensor input, Tensor norm, Tensor? keep, "
      "Tensor? residual, float eps) -> ()");
  m.def(
      "mbconv_training_norm_backward(Tensor(a!) coefficients, Tensor(b!)? weight_gradient, "
      "Tensor(c!)? bias_gradient, Tensor upstream, Tensor input, Tensor norm, Tensor? keep, "
      "float eps) -> ()");
  m.def(
      "mbconv_training_product_backward(Tensor(a!)? input_gradient, "
      "Tensor(b!)? weight_gradient, Tensor(c!)? sums, Tensor upstream, Tensor output, "
      "Tensor output_mean, Tensor coefficients, Tensor? keep, Tensor input, Tensor? norm, "
      "Tensor? gate, Tensor weight, Tensor? residual, float eps, int activation) -> ()");
  m.def(
      "mbconv_training_depthwise_backward(Tensor(a!)? input_gradient, "
      "Tensor(b!)? weight_gradient, Tensor(c!)? coefficients, Tensor(d!)? norm_weight_gradient, "
      "Tensor(e!)? norm_bias_gradient, Tensor(f!)? output_norm_weight_gradient, "
      "Tensor(g!)? output_norm_bias_gradient, Tensor upstream, Tensor output, "
      "Tensor output_norm, Tensor sums, Tensor? gate, Tensor? offset, Tensor input, "
      "Tensor? norm, Tensor weight, Tensor? residual, int[] geometry, float[] eps, "
      "int activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effkernels_cpu, CPU, m) {
  m.impl("mbconv_training_product", TORCH_BOX(&effkernels::mbconv_training_product));
  m.impl("mbconv_training_depthwise", TORCH_BOX(&effkernels::mbconv_training_depthwise));
  m.impl("mbconv_training_pool", TORCH_BOX(&effkernels::mbconv_training_pool));
  m.impl("mbconv_training_finish", TORCH_BOX(&effkernels::mbconv_training_finish));
  m.impl("mbconv_training_norm_backward", TORCH_BOX(&effkernels::mbconv_training_norm_backward));
  m.impl("mbconv_training_product_backward",
         TORCH_BOX(&effkernels::mbconv_training_product_backward));
  m.impl("mbconv_training_depthwise_backward",
         TORCH_BOX(&effkernels::mbconv_training_depthwise_backward));
}
