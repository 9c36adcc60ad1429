// effkernels_cpu::<op>: the CPU kernels as PyTorch ops, through the stable ABI.
//
// effkernels/native.py is the only caller: it has checked shapes, made every tensor dense (NHWC
// for images), packed the weights and allocated the outputs.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "batch_norm_act/batch_norm_act.h"
#include "bindings/arguments.h"
#include "bindings/program.h"
#include "common/isa_select.h"
#include "common/panels.h"
#include "conv/conv.h"
#include "depthwise_conv/depthwise_conv.h"
#include "depthwise_separable_conv/depthwise_separable_conv.h"
#include "mbconv/mbconv.h"
#include "pointwise_conv/pointwise_conv.h"
#include "silu/silu.h"
#include "squeeze_excite/squeeze_excite.h"

namespace effkernels {
namespace {

void depthwise_conv(Tensor output, OptionalTensor mean, Tensor input, Tensor weight,
                    OptionalTensor scale, OptionalTensor bias, std::vector<int64_t> geometry,
                    int64_t activation) {
  DepthwiseConvArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_height = output.size(2);
  args.out_width = output.size(3);
  const int64_t channels = args.in.channels, values = args.in.count * channels;
  args.output = writable("output", output, args.dtype, values * args.out_height * args.out_width);
  args.mean = mean ? writable("mean", *mean, args.dtype, values) : nullptr;
  args.geometry = geometry_of(geometry);
  args.weight = taps_of(weight, args.geometry, channels);
  args.epilogue = epilogue_of(scale, bias, channels, activation);
  args.parallel = torch_threads();
  depthwise_conv_cpu(args);
}

void depthwise_conv_backward(OptionalTensor input_gradient, OptionalTensor weight_gradient,
                             Tensor upstream, Tensor input, Tensor weight,
                             std::vector<int64_t> geometry) {
  DepthwiseConvBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_height = upstream.size(2);
  args.out_width = upstream.size(3);
  const int64_t channels = args.in.channels, pixels = args.out_height * args.out_width;
  args.upstream = writable("upstream", upstream, args.dtype, args.in.count * pixels * channels);
  args.geometry = geometry_of(geometry);
  args.weight = taps_of(weight, args.geometry, channels);
  const int64_t taps = args.geometry.kernel_h * args.geometry.kernel_w;
  if (input_gradient) {
    const int64_t values = args.in.count * args.in.size();
    args.input_gradient = writable("input_gradient", *input_gradient, args.dtype, values);
  }
  args.weight_gradient = optional_floats("weight_gradient", weight_gradient, taps * channels);
  args.parallel = torch_threads();
  depthwise_conv_backward_cpu(args);
}

void pointwise_conv(Tensor output, OptionalTensor mean, Tensor input, Tensor weight,
                    OptionalTensor scale, OptionalTensor bias, OptionalTensor gate,
                    OptionalTensor residual, int64_t activation) {
  PointwiseConvArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_channels = output.size(1);
  const int64_t channels = args.out_channels, values = args.in.count * channels;
  args.output = writable("output", output, args.dtype, values * args.in.pixels());
  args.mean = mean ? writable("mean", *mean, args.dtype, values) : nullptr;
  args.weight = floats("weight", weight, panels_size(channels, args.in.channels));
  args.gate = floats("gate", gate, args.in.count * args.in.channels);
  args.epilogue = epilogue_of(scale, bias, channels, activation);
  args.epilogue.residual = residual_of(residual, args.dtype, values * args.in.pixels());
  args.parallel = torch_threads();
  pointwise_conv_cpu(args);
}

void conv(Tensor output, Tensor input, Tensor weight, OptionalTensor scale, OptionalTensor bias,
          std::vector<int64_t> geometry, OptionalTensor residual, int64_t activation, bool planar,
          OptionalTensor transformed) {
  ConvArgs args{};
  args.planar = planar;
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_height = output.size(2);
  args.out_width = output.size(3);
  args.out_channels = output.size(1);
  const int64_t channels = args.out_channels;
  const int64_t values = args.in.count * args.out_height * args.out_width * channels;
  args.output = writable("output", output, args.dtype, values);
  args.geometry = geometry_of(geometry);
  set_weights(args, weight, transformed);
  args.epilogue = epilogue_of(scale, bias, channels, activation);
  args.epilogue.residual = residual_of(residual, args.dtype, values);
  args.parallel = torch_threads();
  conv_cpu(args);
}

void squeeze_excite(Tensor output, Tensor input, Tensor reduce_weight, OptionalTensor reduce_bias,
                    Tensor expand_weight, OptionalTensor expand_bias, int64_t activation,
                    int64_t gate_activation) {
  SqueezeExciteArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.output = writable("output", output, args.dtype, args.in.count * args.in.size());
  args.weights = gate_of(reduce_weight, reduce_bias, expand_weight, expand_bias, args.in.channels,
                         activation, gate_activation);
  args.parallel = torch_threads();
  squeeze_excite_cpu(args);
}

void squeeze_excite_gate(Tensor gate, Tensor mean, Tensor reduce_weight, OptionalTensor reduce_bias,
                         Tensor expand_weight, OptionalTensor expand_bias, int64_t activation,
                         int64_t gate_activation) {
  SqueezeExciteGateArgs args{};
  args.count = mean.size(0);
  const int64_t channels = mean.size(1), values = args.count * channels;
  args.gate = static_cast<float*>(writable("gate", gate, DType::f32, values));
  args.mean = floats("mean", mean, values);
  args.weights = gate_of(reduce_weight, reduce_bias, expand_weight, expand_bias, channels,
                         activation, gate_activation);
  args.parallel = torch_threads();
  squeeze_excite_gate_cpu(args);
}

SqueezeExciteGradients gate_gradients_of(const SqueezeExciteWeights& weights,
                                         const OptionalTensor& reduce_weight,
                                         const OptionalTensor& reduce_bias,
                                         const OptionalTensor& expand_weight,
                                         const OptionalTensor& expand_bias) {
  const int64_t size = weights.reduced * weights.channels;
  return {optional_floats("reduce_weight_gradient", reduce_weight, size),
          optional_floats("reduce_bias_gradient", reduce_bias, weights.reduced),
          optional_floats("expand_weight_gradient", expand_weight, size),
          optional_floats("expand_bias_gradient", expand_bias, weights.channels)};
}

void squeeze_excite_backward(OptionalTensor input_gradient, OptionalTensor reduce_weight_gradient,
                             OptionalTensor reduce_bias_gradient,
                             OptionalTensor expand_weight_gradient,
                             OptionalTensor expand_bias_gradient, Tensor upstream, Tensor input,
                             Tensor reduce_weight, OptionalTensor reduce_bias, Tensor expand_weight,
                             OptionalTensor expand_bias, int64_t activation,
                             int64_t gate_activation) {
  SqueezeExciteBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  const int64_t values = args.in.count * args.in.size();
  if (input_gradient) {
    args.input_gradient = writable("input_gradient", *input_gradient, args.dtype, values);
  }
  args.upstream = writable("upstream", upstream, args.dtype, values);
  args.weights = gate_of(reduce_weight, reduce_bias, expand_weight, expand_bias, args.in.channels,
                         activation, gate_activation);
  args.gradients = gate_gradients_of(args.weights, reduce_weight_gradient, reduce_bias_gradient,
                                     expand_weight_gradient, expand_bias_gradient);
  args.parallel = torch_threads();
  squeeze_excite_backward_cpu(args);
}

void squeeze_excite_gate_backward(OptionalTensor mean_gradient,
                                  OptionalTensor reduce_weight_gradient,
                                  OptionalTensor reduce_bias_gradient,
                                  OptionalTensor expand_weight_gradient,
                                  OptionalTensor expand_bias_gradient, Tensor upstream, Tensor mean,
                                  Tensor reduce_weight, OptionalTensor reduce_bias,
                                  Tensor expand_weight, OptionalTensor expand_bias,
                                  int64_t activation, int64_t gate_activation) {
  SqueezeExciteGateBackwardArgs args{};
  args.count = mean.size(0);
  const int64_t channels = mean.size(1), values = args.count * channels;
  args.mean_gradient = optional_floats("mean_gradient", mean_gradient, values);
  args.upstream = floats("upstream", upstream, values);
  args.mean = floats("mean", mean, values);
  args.weights = gate_of(reduce_weight, reduce_bias, expand_weight, expand_bias, channels,
                         activation, gate_activation);
  args.gradients = gate_gradients_of(args.weights, reduce_weight_gradient, reduce_bias_gradient,
                                     expand_weight_gradient, expand_bias_gradient);
  args.parallel = torch_threads();
  squeeze_excite_gate_backward_cpu(args);
}

void silu(Tensor output, Tensor input, int64_t activation) {
  SiluArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.size = input.numel();
  args.output = writable("output", output, args.dtype, args.size);
  args.activation = activation_of(activation);
  args.parallel = torch_threads();
  silu_cpu(args);
}

void silu_backward(Tensor input_gradient, Tensor upstream, Tensor input, int64_t activation) {
  SiluBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.size = input.numel();
  args.input_gradient = writable("input_gradient", input_gradient, args.dtype, args.size);
  args.upstream = writable("upstream", upstream, args.dtype, args.size);
  args.activation = activation_of(activation);
  args.parallel = torch_threads();
  silu_backward_cpu(args);
}

void batch_norm_act(Tensor output, Tensor mean, Tensor var, Tensor input, OptionalTensor weight,
                    OptionalTensor bias, OptionalTensor residual, bool training, double eps,
                    int64_t activation) {
  BatchNormActArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  const int64_t channels = args.in.channels, values = args.in.count * args.in.size();
  args.output = writable("output", output, args.dtype, values);
  args.mean = static_cast<float*>(writable("mean", mean, DType::f32, channels));
  args.var = static_cast<float*>(writable("var", var, DType::f32, channels));
  args.weight = floats("weight", weight, channels);
  args.bias = floats("bias", bias, channels);
  args.residual = residual_of(residual, args.dtype, values);
  args.training = training;
  args.eps = eps;
  args.activation = activation_of(activation);
  args.parallel = torch_threads();
  batch_norm_act_cpu(args);
}

void batch_norm_act_backward(OptionalTensor input_gradient, OptionalTensor residual_gradient,
                             OptionalTensor weight_gradient, OptionalTensor bias_gradient,
                             OptionalTensor mean_gradient, OptionalTensor var_gradient,
                             Tensor upstream, Tensor input, Tensor mean, Tensor var,
                             OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                             OptionalTensor upstream_mean, OptionalTensor upstream_var,
                             bool training, double eps, int64_t activation) {
  BatchNormActBackwardArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  const int64_t channels = args.in.channels, values = args.in.count * args.in.size();
  const auto images = [&](const char* name, const OptionalTensor& tensor) {
    return tensor ? writable(name, *tensor, args.dtype, values) : nullptr;
  };
  args.input_gradient = images("input_gradient", input_gradient);
  args.residual_gradient = images("residual_gradient", residual_gradient);
  args.weight_gradient = optional_floats("weight_gradient", weight_gradient, channels);
  args.bias_gradient = optional_floats("bias_gradient", bias_gradient, channels);
  args.mean_gradient = optional_floats("mean_gradient", mean_gradient, channels);
  args.var_gradient = optional_floats("var_gradient", var_gradient, channels);
  args.upstream = images("upstream", upstream);
  args.mean = floats("mean", mean, channels);
  args.var = floats("var", var, channels);
  args.weight = floats("weight", weight, channels);
  args.bias = floats("bias", bias, channels);
  args.residual = residual_of(residual, args.dtype, values);
  args.upstream_mean = floats("upstream_mean", upstream_mean, channels);
  args.upstream_var = floats("upstream_var", upstream_var, channels);
  args.training = training;
  args.eps = eps;
  args.activation = activation_of(activation);
  args.parallel = torch_threads();
  batch_norm_act_backward_cpu(args);
}

// What depthwise_separable_conv and mbconv share.
MBConvArgs block_of(const Tensor& output, const Tensor& input, const Tensor& depthwise_weight,
                    const Tensor& project_weight, const std::vector<int64_t>& geometry) {
  MBConvArgs args{};
  args.dtype = dtype_of(input);
  args.input = input.const_data_ptr();
  args.in = images_of(input);
  args.out_height = output.size(2);
  args.out_width = output.size(3);
  args.out_channels = output.size(1);
  args.output = writable("output", output, args.dtype,
                         args.in.count * args.out_height * args.out_width * args.out_channels);
  args.expanded = project_weight.size(1);  // panels are [K / 16, depth, 16]
  args.geometry = geometry_of(geometry);
  args.depthwise_weight = taps_of(depthwise_weight, args.geometry, args.expanded);
  args.project_weight =
      floats("project_weight", project_weight, panels_size(args.out_channels, args.expanded));
  args.parallel = torch_threads();
  return args;
}

void depthwise_separable_conv(Tensor output, Tensor input, Tensor depthwise_weight,
                              OptionalTensor depthwise_scale, OptionalTensor depthwise_bias,
                              Tensor pointwise_weight, OptionalTensor pointwise_scale,
                              OptionalTensor pointwise_bias, std::vector<int64_t> geometry,
                              OptionalTensor residual, int64_t depthwise_activation,
                              int64_t activation) {
  MBConvArgs args = block_of(output, input, depthwise_weight, pointwise_weight, geometry);
  STD_TORCH_CHECK(args.expanded == args.in.channels, "effkernels_cpu: pointwise_weight is for ",
                  args.expanded, " channels, input has ", args.in.channels);
  args.depthwise =
      epilogue_of(depthwise_scale, depthwise_bias, args.expanded, depthwise_activation);
  args.project = epilogue_of(pointwise_scale, pointwise_bias, args.out_channels, activation);
  args.project.residual = residual_of(residual, args.dtype, output.numel());
  depthwise_separable_conv_cpu(args);
}

Matrix matrix_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, "effkernels_cpu: not a matrix");
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  return {floats("matrix", tensor, rows * columns), rows, columns, tensor.stride(0),
          tensor.stride(1)};
}

float* packed(const Tensor& tensor, int64_t size) {
  return static_cast<float*>(writable("packed", tensor, DType::f32, size));
}

void pack_panels(Tensor panels, Tensor matrix) {
  const Matrix from = matrix_of(matrix);
  write_panels(from, packed(panels, panels_size(from.rows, from.columns)), torch_threads());
}

void pack_taps(Tensor taps, Tensor matrix, bool reversed) {
  const Matrix from = matrix_of(matrix);
  write_taps(from, reversed, packed(taps, panels_size(from.rows, from.columns)));
}

void mbconv(Tensor output, Tensor input, OptionalTensor expand_weight, OptionalTensor expand_scale,
            OptionalTensor expand_bias, Tensor depthwise_weight, OptionalTensor depthwise_scale,
            OptionalTensor depthwise_bias, OptionalTensor se_reduce_weight,
            OptionalTensor se_reduce_bias, OptionalTensor se_expand_weight,
            OptionalTensor se_expand_bias, Tensor project_weight, OptionalTensor project_scale,
            OptionalTensor project_bias, std::vector<int64_t> geometry, bool residual,
            std::vector<int64_t> activations) {
  STD_TORCH_CHECK(activations.size() == 4, "effkernels_cpu: mbconv has 4 activations");
  MBConvArgs args = block_of(output, input, depthwise_weight, project_weight, geometry);
  const int64_t expanded = args.expanded, channels = args.in.channels;
  STD_TORCH_CHECK(expand_weight || expanded == channels, "effkernels_cpu: project_weight is for ",
                  expanded, " channels, input has ", channels);
  args.expand_weight = floats("expand_weight", expand_weight, panels_size(expanded, channels));
  args.expand = epilogue_of(expand_scale, expand_bias, expanded, activations[0]);
  args.depthwise = epilogue_of(depthwise_scale, depthwise_bias, expanded, activations[0]);
  args.squeeze_excite = se_reduce_weight.has_value() && se_expand_weight.has_value();
  if (args.squeeze_excite) {
    args.gate = gate_of(*se_reduce_weight, se_reduce_bias, *se_expand_weight, se_expand_bias,
                        expanded, activations[1], activations[2]);
  }
  args.project = epilogue_of(project_scale, project_bias, args.out_channels, activations[3]);
  if (residual) args.project.residual = residual_of(input, args.dtype, output.numel());
  mbconv_cpu(args);
}

std::string isas() { return isa_names(); }
std::string isa() { return isa_name(); }
void set_isa(std::string name) {
  STD_TORCH_CHECK(choose_isa(name), "effkernels_cpu: no instruction set ", name, " here");
}

}  // namespace
}  // namespace effkernels

STABLE_TORCH_LIBRARY(effkernels_cpu, m) {
  m.def("program_create(int[] values, int[] steps, Tensor[] weights, bool bf16) -> int");
  m.def("program_run(int handle, Tensor(a!)[] tensors) -> ()");
  m.def("program_free(int handle) -> ()");
  m.def("isas() -> str");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def(
      "depthwise_conv(Tensor(a!) output, Tensor(b!)? mean, Tensor input, Tensor weight, "
      "Tensor? scale, Tensor? bias, int[] geometry, int activation) -> ()");
  m.def(
      "depthwise_conv_backward(Tensor(a!)? input_gradient, Tensor(b!)? weight_gradient, "
      "Tensor upstream, Tensor input, Tensor weight, int[] geometry) -> ()");
  m.def(
      "pointwise_conv(Tensor(a!) output, Tensor(b!)? mean, Tensor input, Tensor weight, "
      "Tensor? scale, Tensor? bias, Tensor? gate, Tensor? residual, int activation) -> ()");
  m.def(
      "conv(Tensor(a!) output, Tensor input, Tensor weight, Tensor? scale, Tensor? bias, "
      "int[] geometry, Tensor? residual, int activation, bool planar, "
      "Tensor? transformed=None) -> ()");
  m.def(
      "squeeze_excite(Tensor(a!) output, Tensor input, Tensor reduce_weight, Tensor? reduce_bias, "
      "Tensor expand_weight, Tensor? expand_bias, int activation, int gate_activation) -> ()");
  m.def(
      "squeeze_excite_gate(Tensor(a!) gate, Tensor mean, Tensor reduce_weight, "
      "Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, int activation, "
      "int gate_activation) -> ()");
  m.def(
      "squeeze_excite_backward(Tensor(a!)? input_gradient, Tensor(b!)? reduce_weight_gradient, "
      "Tensor(c!)? reduce_bias_gradient, Tensor(d!)? expand_weight_gradient, "
      "Tensor(e!)? expand_bias_gradient, Tensor upstream, Tensor input, Tensor reduce_weight, "
      "Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, int activation, "
      "int gate_activation) -> ()");
  m.def(
      "squeeze_excite_gate_backward(Tensor(a!)? mean_gradient, "
      "Tensor(b!)? reduce_weight_gradient, Tensor(c!)? reduce_bias_gradient, "
      "Tensor(d!)? expand_weight_gradient, Tensor(e!)? expand_bias_gradient, Tensor upstream, "
      "Tensor mean, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, "
      "Tensor? expand_bias, int activation, int gate_activation) -> ()");
  m.def("silu(Tensor(a!) output, Tensor input, int activation) -> ()");
  m.def(
      "silu_backward(Tensor(a!) input_gradient, Tensor upstream, Tensor input, "
      "int activation) -> ()");
  m.def(
      "batch_norm_act(Tensor(a!) output, Tensor(b!) mean, Tensor(c!) var, Tensor input, "
      "Tensor? weight, Tensor? bias, Tensor? residual, bool training, float eps, "
      "int activation) -> ()");
  m.def(
      "batch_norm_act_backward(Tensor(a!)? input_gradient, Tensor(b!)? residual_gradient, "
      "Tensor(c!)? weight_gradient, Tensor(d!)? bias_gradient, Tensor(e!)? mean_gradient, "
      "Tensor(f!)? var_gradient, Tensor upstream, Tensor input, Tensor mean, Tensor var, "
      "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? upstream_mean, "
      "Tensor? upstream_var, bool training, float eps, int activation) -> ()");
  m.def(
      "depthwise_separable_conv(Tensor(a!) output, Tensor input, Tensor depthwise_weight, "
      "Tensor? depthwise_scale, Tensor? depthwise_bias, Tensor pointwise_weight, "
      "Tensor? pointwise_scale, Tensor? pointwise_bias, int[] geometry, Tensor? residual, "
      "int depthwise_activation, int activation) -> ()");
  m.def(
      "mbconv(Tensor(a!) output, Tensor input, Tensor? expand_weight, Tensor? expand_scale, "
      "Tensor? expand_bias, Tensor depthwise_weight, Tensor? depthwise_scale, "
      "Tensor? depthwise_bias, Tensor? se_reduce_weight, Tensor? se_reduce_bias, "
      "Tensor? se_expand_weight, Tensor? se_expand_bias, Tensor project_weight, "
      "Tensor? project_scale, Tensor? project_bias, int[] geometry, bool residual, "
      "int[] activations) -> ()");
  m.def("pack_panels(Tensor(a!) panels, Tensor matrix) -> ()");
  m.def("pack_taps(Tensor(a!) taps, Tensor matrix, bool reversed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effkernels_cpu, CPU, m) {
  m.impl("depthwise_conv", TORCH_BOX(&effkernels::depthwise_conv));
  m.impl("depthwise_conv_backward", TORCH_BOX(&effkernels::depthwise_conv_backward));
  m.impl("pointwise_conv", TORCH_BOX(&effkernels::pointwise_conv));
  m.impl("conv", TORCH_BOX(&effkernels::conv));
  m.impl("squeeze_excite", TORCH_BOX(&effkernels::squeeze_excite));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effkernels::squeeze_excite_gate));
  m.impl("squeeze_excite_backward", TORCH_BOX(&effkernels::squeeze_excite_backward));
  m.impl("squeeze_excite_gate_backward", TORCH_BOX(&effkernels::squeeze_excite_gate_backward));
  m.impl("silu", TORCH_BOX(&effkernels::silu));
  m.impl("silu_backward", TORCH_BOX(&effkernels::silu_backward));
  m.impl("batch_norm_act", TORCH_BOX(&effkernels::batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&effkernels::batch_norm_act_backward));
  m.impl("depthwise_separable_conv", TORCH_BOX(&effkernels::depthwise_separable_conv));
  m.impl("mbconv", TORCH_BOX(&effkernels::mbconv));
  m.impl("pack_panels", TORCH_BOX(&effkernels::pack_panels));
  m.impl("pack_taps", TORCH_BOX(&effkernels::pack_taps));
}

STABLE_TORCH_LIBRARY_IMPL(effkernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("program_create", TORCH_BOX(&effkernels::program_create));
  m.impl("program_run", TORCH_BOX(&effkernels::program_run));
  m.impl("program_free", TORCH_BOX(&effkernels::program_free));
  m.impl("isas", TORCH_BOX(&effkernels::isas));
  m.impl("isa", TORCH_BOX(&effkernels::isa));
  m.impl("set_isa", TORCH_BOX(&effkernels::set_isa));
}
