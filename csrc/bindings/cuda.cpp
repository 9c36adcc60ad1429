// effkernels_cuda::<op>: the CUDA kernels as PyTorch ops, through the stable ABI.
//
// effkernels/cuda is the only caller: it has checked shapes, made every tensor dense (NHWC for
// images) and allocated the outputs. With EFFKERNELS_EMULATED the same ops take CPU tensors, and
// the kernels run on an emulated GPU: so this file is tested, too.
#define EFFKERNELS_CUDA
#include "batch_norm_act/cuda.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/arguments.h"
#include "depthwise_conv/cuda.h"
#include "mbconv/cuda.h"
#include "pointwise_conv/cuda.h"
#include "silu/cuda.h"
#include "squeeze_excite/cuda.h"

#if defined(EFFKERNELS_EMULATED)
#include "common/emulation.h"
#else
#include <torch/csrc/stable/accelerator.h>

// Exported by every torch with CUDA; its header declares it only where CUDA's own headers are.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace effkernels {
namespace {

// Makes a tensor's device the current one while it lives, and knows PyTorch's stream there.
class OnDevice {
 public:
#if defined(EFFKERNELS_EMULATED)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device()) {
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream_);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "effkernels_cuda: PyTorch gives no stream");
  }
#endif

  void* stream() const { return stream_; }

 private:
#if !defined(EFFKERNELS_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// A tensor of `input`'s dtype, or null.
const void* operand_of(const char* name, const OptionalTensor& tensor, DType dtype, int64_t size) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(dtype_of(*tensor) == dtype, "effkernels_cuda: ", name, " has another dtype");
  check_size(name, *tensor, size);
  return tensor->const_data_ptr();
}

void activation(Tensor output, Tensor input, OptionalTensor upstream, int64_t activation) {
  const OnDevice device(input);
  const DType dtype = dtype_of(input);
  const int64_t size = input.numel();
  activation_cuda({dtype, writable("output", output, dtype, size), input.const_data_ptr(),
                   residual_of(upstream, dtype, size), size, activation_of(activation),
                   device.stream()});
}

void pointwise_conv(Tensor output, OptionalTensor sums, Tensor input, Tensor weight,
                    OptionalTensor scale, OptionalTensor bias, OptionalTensor gate,
                    OptionalTensor residual, int64_t activation) {
  const OnDevice device(input);
  const Images in = images_of(input);
  PointwiseConvCuda args{};
  args.dtype = dtype_of(input);
  args.images = in.count;
  args.pixels = in.pixels();
  args.channels = in.channels;
  args.outputs = weight.size(0);
  const int64_t size = in.count * in.pixels() * args.outputs;
  args.output = writable("output", output, args.dtype, size);
  args.input = input.const_data_ptr();
  args.weight = operand_of("weight", weight, args.dtype, args.outputs * in.channels);
  args.scale = floats("scale", scale, args.outputs);
  args.bias = floats("bias", bias, args.outputs);
  args.gate = operand_of("gate", gate, args.dtype, in.count * in.channels);
  args.residual = residual_of(residual, args.dtype, size);
  args.activation = activation_of(activation);
  args.places = pointwise_conv_cuda_places(args.pixels);
  if (sums) {
    const int64_t places = in.count * args.places * args.outputs;
    args.sums = static_cast<float*>(writable("sums", *sums, DType::f32, places));
  }
  args.stream = device.stream();
  pointwise_conv_cuda(args);
}

void expand_depthwise(Tensor output, OptionalTensor partials, Tensor input, Tensor expand_weight,
                      OptionalTensor expand_scale, OptionalTensor expand_bias, Tensor taps,
                      OptionalTensor scale, OptionalTensor bias, std::vector<int64_t> geometry,
                      std::vector<int64_t> config, int64_t activation) {
  const OnDevice device(input);
  STD_TORCH_CHECK(config.size() == 3, "effkernels_cuda: mbconv: a configuration has 3 numbers");
  for (const int64_t number : config) {
    STD_TORCH_CHECK(number >= 1, "effkernels_cuda: mbconv: bad configuration");
  }
  ExpandDepthwiseCuda args{};
  args.dtype = dtype_of(input);
  args.in = images_of(input);
  args.expanded = expand_weight.size(0);
  args.output_height = output.size(2);
  args.output_width = output.size(3);
  args.geometry = geometry_of(geometry);
  args.tile_height = config[0];
  args.tile_width = config[1];
  args.groups = config[2];
  const int64_t pixels = args.output_height * args.output_width;
  args.output = writable("output", output, args.dtype, args.in.count * pixels * args.expanded);
  if (partials) {
    const int64_t tiles = ceil_div(args.output_height, args.tile_height) *
                          ceil_div(args.output_width, args.tile_width);
    args.partials = static_cast<float*>(
        writable("partials", *partials, DType::f32, args.in.count * tiles * args.expanded));
  }
  args.input = input.const_data_ptr();
  args.expand_weight =
      operand_of("expand_weight", expand_weight, args.dtype, args.expanded * args.in.channels);
  args.expand_scale = floats("expand_scale", expand_scale, args.expanded);
  args.expand_bias = floats("expand_bias", expand_bias, args.expanded);
  const Geometry& g = args.geometry;
  args.taps = operand_of("taps", taps, args.dtype, g.kernel_h * g.kernel_w * args.expanded);
  args.scale = floats("scale", scale, args.expanded);
  args.bias = floats("bias", bias, args.expanded);
  args.activation = activation_of(activation);
  args.stream = device.stream();
  expand_depthwise_cuda(args);
}

// A vector of `dtype` or of float32.
Values values_of(const char* name, const OptionalTensor& tensor, DType dtype, int64_t size) {
  if (!tensor) return {};
  const DType found = dtype_of(*tensor);
  STD_TORCH_CHECK(found == dtype || found == DType::f32, EFFKERNELS_LIBRARY, name,
                  " has another dtype");
  check_size(name, *tensor, size);
  return {tensor->const_data_ptr(), found == DType::f32};
}

// The same to be written.
Written written_of(const char* name, const OptionalTensor& tensor, DType dtype, int64_t size) {
  const Values values = values_of(name, tensor, dtype, size);
  return {const_cast<void*>(values.data), values.is_float};
}

float* float_data(const OptionalTensor& tensor) {
  return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

// Global memory for partial results; PyTorch keeps it until the stream's kernels are through.
Tensor scratch_like(const Tensor& tensor, int64_t floats) {
  return torch::stable::new_empty(tensor, {floats}, torch::headeronly::ScalarType::Float);
}

GateWeights gate_weights_of(const Tensor& reduce_weight, const OptionalTensor& reduce_bias,
                            const Tensor& expand_weight, const OptionalTensor& expand_bias,
                            int64_t activation, int64_t gate_activation) {
  const DType dtype = dtype_of(expand_weight);
  const int64_t reduced = reduce_weight.size(0), channels = reduce_weight.size(1);
  STD_TORCH_CHECK(dtype_of(reduce_weight) == dtype,
                  EFFKERNELS_LIBRARY "reduce_weight has another dtype than expand_weight");
  check_size("expand_weight", expand_weight, channels * reduced);
  STD_TORCH_CHECK(squeeze_excite_fits(channels, reduced),
                  EFFKERNELS_LIBRARY "squeeze_excite: too many channels for the shared memory");
  return {dtype,
          channels,
          reduced,
          reduce_weight.const_data_ptr(),
          values_of("reduce_bias", reduce_bias, dtype, reduced),
          expand_weight.const_data_ptr(),
          values_of("expand_bias", expand_bias, dtype, channels),
          activation_of(activation),
          activation_of(gate_activation)};
}

bool gate_fits(Tensor input, int64_t channels, int64_t reduced) {
  const OnDevice device(input);
  return squeeze_excite_fits(channels, reduced);
}

void squeeze_excite_gate(Tensor gate, Tensor mean, double factor, Tensor reduce_weight,
                         OptionalTensor reduce_bias, Tensor expand_weight,
                         OptionalTensor expand_bias, int64_t activation, int64_t gate_activation) {
  const OnDevice device(mean);
  const GateWeights weights = gate_weights_of(reduce_weight, reduce_bias, expand_weight,
                                              expand_bias, activation, gate_activation);
  const int64_t images = mean.size(0), blocks = mean.dim() == 3 ? mean.size(1) : 1;
  squeeze_excite_gate_cuda(
      {weights, writable("gate", gate, weights.dtype, images * weights.channels),
       values_of("mean", mean, weights.dtype, images * blocks * weights.channels), images, blocks,
       factor, device.stream()});
}

// A gradient in the dtype of its parameter.
Written gradient_of(const char* name, const OptionalTensor& tensor, const OptionalTensor& like,
                    DType dtype, int64_t size) {
  STD_TORCH_CHECK(!tensor || (like && like->scalar_type() == tensor->scalar_type()),
                  EFFKERNELS_LIBRARY, name, " has another dtype than its parameter");
  return written_of(name, tensor, dtype, size);
}

void squeeze_excite(Tensor output, Tensor input, Tensor reduce_weight, OptionalTensor reduce_bias,
                    Tensor expand_weight, OptionalTensor expand_bias, int64_t activation,
                    int64_t gate_activation) {
  const OnDevice device(input);
  const GateWeights weights = gate_weights_of(reduce_weight, reduce_bias, expand_weight,
                                              expand_bias, activation, gate_activation);
  const DType dtype = weights.dtype;
  const Images in = images_of(input);
  const int64_t images = in.count, rows = in.pixels(), channels = in.channels;
  STD_TORCH_CHECK(dtype_of(input) == dtype && channels == weights.channels,
                  EFFKERNELS_LIBRARY "squeeze_excite: the weights do not fit the input");
  const int64_t blocks = squeeze_excite_pool_blocks(dtype, images, rows, channels, false);
  const Tensor sums = scratch_like(input, images * blocks * channels);
  const Tensor gate = torch::stable::new_empty(input, {images, channels});
  squeeze_excite_pool_cuda({dtype, float_data(sums), nullptr, input.const_data_ptr(), nullptr,
                            images, rows, channels, device.stream()});
  squeeze_excite_gate_cuda({weights,
                            gate.mutable_data_ptr(),
                            {float_data(sums), true},
                            images,
                            blocks,
                            1.0 / static_cast<double>(rows),
                            device.stream()});
  squeeze_excite_scale_cuda({dtype, writable("output", output, dtype, input.numel()),
                             input.const_data_ptr(), gate.const_data_ptr(), nullptr, 0.0, images,
                             rows, channels, device.stream()});
}

void squeeze_excite_backward(OptionalTensor input_gradient, OptionalTensor reduce_weight_gradient,
                             OptionalTensor reduce_bias_gradient,
                             OptionalTensor expand_weight_gradient,
                             OptionalTensor expand_bias_gradient, Tensor upstream, Tensor input,
                             Tensor reduce_weight, OptionalTensor reduce_bias, Tensor expand_weight,
                             OptionalTensor expand_bias, int64_t activation,
                             int64_t gate_activation) {
  const OnDevice device(input);
  const GateWeights weights = gate_weights_of(reduce_weight, reduce_bias, expand_weight,
                                              expand_bias, activation, gate_activation);
  const DType dtype = weights.dtype;
  const Images in = images_of(input);
  const int64_t images = in.count, rows = in.pixels(), channels = in.channels;
  const int64_t reduced = weights.reduced, vectors = images * channels;
  STD_TORCH_CHECK(dtype_of(input) == dtype && channels == weights.channels,
                  EFFKERNELS_LIBRARY "squeeze_excite: the weights do not fit the input");
  const void* upstream_data = residual_of(upstream, dtype, input.numel());
  const int64_t blocks = squeeze_excite_pool_blocks(dtype, images, rows, channels, true);
  const Tensor sums = scratch_like(input, vectors * blocks);
  const Tensor products = scratch_like(input, vectors * blocks);
  const Tensor scratch =
      scratch_like(input, squeeze_excite_gate_scratch(images, channels, reduced));
  const double factor = 1.0 / static_cast<double>(rows);
  OptionalTensor gate, mean_gradient;
  if (input_gradient) {
    gate = torch::stable::new_empty(input, {images, channels});
    mean_gradient = scratch_like(input, vectors);
  }
  squeeze_excite_pool_cuda({dtype, float_data(sums), float_data(products), input.const_data_ptr(),
                            upstream_data, images, rows, channels, device.stream()});
  squeeze_excite_gate_backward_cuda(
      {weights,
       gate ? gate->mutable_data_ptr() : nullptr,
       {float_data(sums), true},
       {float_data(products), true},
       images,
       blocks,
       factor,
       {float_data(mean_gradient), true},
       gradient_of("reduce_weight_gradient", reduce_weight_gradient, reduce_weight, dtype,
                   reduced * channels),
       gradient_of("reduce_bias_gradient", reduce_bias_gradient, reduce_bias, dtype, reduced),
       gradient_of("expand_weight_gradient", expand_weight_gradient, expand_weight, dtype,
                   reduced * channels),
       gradient_of("expand_bias_gradient", expand_bias_gradient, expand_bias, dtype, channels),
       float_data(scratch),
       device.stream()});
  if (!input_gradient) return;
  squeeze_excite_scale_cuda({dtype,
                             writable("input_gradient", *input_gradient, dtype, input.numel()),
                             upstream_data, gate->const_data_ptr(), float_data(mean_gradient),
                             factor, images, rows, channels, device.stream()});
}

void squeeze_excite_gate_backward(OptionalTensor mean_gradient,
                                  OptionalTensor reduce_weight_gradient,
                                  OptionalTensor reduce_bias_gradient,
                                  OptionalTensor expand_weight_gradient,
                                  OptionalTensor expand_bias_gradient, Tensor upstream, Tensor mean,
                                  Tensor reduce_weight, OptionalTensor reduce_bias,
                                  Tensor expand_weight, OptionalTensor expand_bias,
                                  int64_t activation, int64_t gate_activation) {
  const OnDevice device(mean);
  const GateWeights weights = gate_weights_of(reduce_weight, reduce_bias, expand_weight,
                                              expand_bias, activation, gate_activation);
  const DType dtype = weights.dtype;
  const int64_t images = mean.size(0), channels = weights.channels, reduced = weights.reduced;
  const int64_t size = images * channels;
  const Tensor scratch = scratch_like(mean, squeeze_excite_gate_scratch(images, channels, reduced));
  squeeze_excite_gate_backward_cuda(
      {weights, nullptr, values_of("mean", mean, dtype, size),
       values_of("upstream", upstream, dtype, size), images, 1, 1.0,
       gradient_of("mean_gradient", mean_gradient, mean, dtype, size),
       gradient_of("reduce_weight_gradient", reduce_weight_gradient, reduce_weight, dtype,
                   reduced * channels),
       gradient_of("reduce_bias_gradient", reduce_bias_gradient, reduce_bias, dtype, reduced),
       gradient_of("expand_weight_gradient", expand_weight_gradient, expand_weight, dtype,
                   reduced * channels),
       gradient_of("expand_bias_gradient", expand_bias_gradient, expand_bias, dtype, channels),
       float_data(scratch), device.stream()});
}

void batch_norm_act(Tensor output, Tensor input, OptionalTensor residual, Tensor mean, Tensor var,
                    OptionalTensor weight, OptionalTensor bias, bool training, double eps,
                    int64_t activation) {
  const OnDevice device(input);
  const DType dtype = dtype_of(input);
  const int64_t channels = input.size(1), size = input.numel();
  const int64_t rows = channels == 0 ? 0 : size / channels;
  BatchNormActCuda args = {};
  args.dtype = dtype;
  args.output = writable("output", output, dtype, size);
  args.input = input.const_data_ptr();
  args.residual = residual_of(residual, dtype, size);
  args.rows = rows;
  args.channels = channels;
  args.normalization = {
      values_of("mean", mean, dtype, channels), values_of("var", var, dtype, channels),
      values_of("weight", weight, dtype, channels), values_of("bias", bias, dtype, channels), eps};
  args.activation = activation_of(activation);
  args.stream = device.stream();
  if (!training) return batch_norm_act_cuda(args, false);
  floats("mean", mean, channels);
  floats("var", var, channels);
  const Tensor scratch = scratch_like(input, batch_norm_act_scratch(dtype, rows, channels));
  args.mean = float_data(mean);
  args.var = float_data(var);
  args.scratch = float_data(scratch);
  batch_norm_act_cuda(args, true);
}

void batch_norm_act_backward(OptionalTensor input_gradient, OptionalTensor residual_gradient,
                             OptionalTensor weight_gradient, OptionalTensor bias_gradient,
                             OptionalTensor mean_gradient, OptionalTensor var_gradient,
                             Tensor upstream, Tensor input, OptionalTensor residual, Tensor mean,
                             Tensor var, OptionalTensor weight, OptionalTensor bias,
                             OptionalTensor mean_upstream, OptionalTensor var_upstream,
                             bool training, double eps, int64_t activation) {
  const OnDevice device(input);
  const DType dtype = dtype_of(input);
  const int64_t channels = input.size(1), size = input.numel();
  const int64_t rows = channels == 0 ? 0 : size / channels;
  const auto output = [&](const char* name, const OptionalTensor& tensor) {
    return tensor ? writable(name, *tensor, dtype, size) : nullptr;
  };
  const auto parameter = [&](const char* name, const OptionalTensor& tensor) {
    return values_of(name, tensor, dtype, channels);
  };
  const auto gradient = [&](const char* name, const OptionalTensor& tensor,
                            const OptionalTensor& like) {
    return gradient_of(name, tensor, like, dtype, channels);
  };
  const Tensor scratch =
      scratch_like(input, batch_norm_act_backward_scratch(dtype, rows, channels));
  batch_norm_act_backward_cuda({dtype,
                                output("input_gradient", input_gradient),
                                output("residual_gradient", residual_gradient),
                                residual_of(upstream, dtype, size),
                                input.const_data_ptr(),
                                residual_of(residual, dtype, size),
                                rows,
                                channels,
                                {parameter("mean", mean), parameter("var", var),
                                 parameter("weight", weight), parameter("bias", bias), eps},
                                training,
                                gradient("weight_gradient", weight_gradient, weight),
                                gradient("bias_gradient", bias_gradient, bias),
                                gradient("mean_gradient", mean_gradient, mean),
                                gradient("var_gradient", var_gradient, var),
                                floats("mean_upstream", mean_upstream, channels),
                                floats("var_upstream", var_upstream, channels),
                                float_data(scratch),
                                activation_of(activation),
                                device.stream()});
}

// The operand of a depthwise kernel for a tensor [count, channels, ...]; see operands.py.
DepthwiseOperand depthwise_operand(int64_t kind, int64_t activation, const OptionalTensor& z,
                                   const OptionalTensor& scale, const OptionalTensor& shift,
                                   const OptionalTensor& gate, const OptionalTensor& offset,
                                   const OptionalTensor& factor, const OptionalTensor& slope,
                                   const OptionalTensor& constant, DType dtype,
                                   const Images& images) {
  const int64_t channels = images.channels, each = images.count * channels;
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, EFFKERNELS_LIBRARY "unknown operand");
  return {static_cast<DepthwiseOperand::Kind>(kind),
          residual_of(z, dtype, images.count * images.size()),
          floats("operand scale", scale, channels),
          floats("operand shift", shift, channels),
          floats("operand gate", gate, each),
          floats("operand offset", offset, each),
          floats("operand factor", factor, channels),
          floats("operand slope", slope, channels),
          floats("operand constant", constant, channels),
          activation_of(activation)};
}

DepthwiseTile depthwise_tile(const std::vector<int64_t>& tile) {
  STD_TORCH_CHECK(tile.size() >= 4, EFFKERNELS_LIBRARY "a tile has 4 numbers");
  for (const int64_t number : tile) {
    STD_TORCH_CHECK(number > 0 && number < 1 << 20, EFFKERNELS_LIBRARY "bad tile");
  }
  return {static_cast<int>(tile[0]), static_cast<int>(tile[1]), static_cast<int>(tile[2]),
          static_cast<int>(tile[3])};
}

void depthwise_conv(Tensor output, OptionalTensor sums, OptionalTensor mean, OptionalTensor moments,
                    OptionalTensor workspace, Tensor input, Tensor taps, OptionalTensor scale,
                    OptionalTensor bias, OptionalTensor z, OptionalTensor operand_scale,
                    OptionalTensor operand_shift, OptionalTensor gate, OptionalTensor offset,
                    OptionalTensor factor, OptionalTensor slope, OptionalTensor constant,
                    std::vector<int64_t> geometry, std::vector<int64_t> between, bool flipped,
                    int64_t activation, int64_t operand_kind, int64_t operand_activation,
                    std::vector<int64_t> tile) {
  const OnDevice device(input);
  const DType dtype = dtype_of(input);
  const Images in = images_of(input);
  const int64_t channels = in.channels, height = output.size(2), width = output.size(3);
  STD_TORCH_CHECK(geometry.size() == 8 && between.size() == 2 && dtype_of(taps) == dtype,
                  EFFKERNELS_LIBRARY "bad geometry");
  for (size_t i = 0; i < 6; i++) {
    STD_TORCH_CHECK(geometry[i] > 0, EFFKERNELS_LIBRARY "bad geometry");
  }
  const Geometry g = {geometry[0], geometry[1], geometry[2], geometry[3],
                      geometry[4], geometry[5], geometry[6], geometry[7]};
  check_size("taps", taps, g.kernel_h * g.kernel_w * channels);
  DepthwiseConvCuda args = {
      dtype,
      writable("output", output, dtype, in.count * height * width * channels),
      input.const_data_ptr(),
      in,
      height,
      width,
      taps.const_data_ptr(),
      g,
      between[0],
      between[1],
      flipped,
      floats("scale", scale, channels),
      floats("bias", bias, channels),
      activation_of(activation),
      depthwise_operand(operand_kind, operand_activation, z, operand_scale, operand_shift, gate,
                        offset, factor, slope, constant, dtype, in),
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      depthwise_tile(tile),
      device.stream()};
  const auto writable_floats = [](const char* name, const OptionalTensor& tensor, int64_t size) {
    if (!tensor) return static_cast<float*>(nullptr);
    return static_cast<float*>(writable(name, *tensor, DType::f32, size));
  };
  args.sums = writable_floats("sums", sums, in.count * depthwise_blocks(args) * channels);
  args.mean = writable_floats("mean", mean, in.count * channels);
  args.moments = writable_floats("moments", moments, 2 * channels);
  args.workspace = writable_floats("workspace", workspace, depthwise_workspace(args));
  STD_TORCH_CHECK(args.moments == nullptr || args.workspace != nullptr,
                  EFFKERNELS_LIBRARY "moments need a workspace");
  depthwise_conv_cuda(args);
}

// totals and partials: for the taps, then the bias.
void depthwise_gradient(OptionalTensor output, OptionalTensor totals, OptionalTensor partials,
                        Tensor upstream, Tensor input, Tensor taps, OptionalTensor scale,
                        OptionalTensor z, OptionalTensor gradient_scale,
                        OptionalTensor gradient_shift, OptionalTensor gradient_gate,
                        OptionalTensor offset, OptionalTensor factor, OptionalTensor slope,
                        OptionalTensor constant, OptionalTensor forward_scale,
                        OptionalTensor forward_shift, OptionalTensor forward_gate,
                        std::vector<int64_t> geometry, std::vector<int64_t> kinds,
                        std::vector<int64_t> tile, int64_t programs) {
  const OnDevice device(upstream);
  const DType dtype = dtype_of(upstream);
  const Images in = images_of(input);
  const Geometry g = geometry_of(geometry);
  const Images up = images_of(upstream);
  STD_TORCH_CHECK(kinds.size() == 4 && programs > 0 && up.count == in.count &&
                      up.channels == in.channels && dtype_of(taps) == dtype &&
                      dtype_of(input) == dtype,
                  EFFKERNELS_LIBRARY "depthwise_gradient: tensors that do not belong together");
  const int64_t channels = in.channels, rows = g.kernel_h * g.kernel_w;
  check_size("taps", taps, rows * channels);
  const int64_t sums = (rows + 1) * channels;
  const auto floats_of = [](const char* name, const OptionalTensor& tensor, int64_t size) {
    return tensor ? static_cast<float*>(writable(name, *tensor, DType::f32, size)) : nullptr;
  };
  depthwise_gradient_cuda(
      {dtype, output ? writable("output", *output, dtype, in.count * in.size()) : nullptr,
       floats_of("totals", totals, sums), floats_of("partials", partials, programs * sums),
       upstream.const_data_ptr(), input.const_data_ptr(), in, up.height, up.width,
       taps.const_data_ptr(), g, floats("scale", scale, channels),
       depthwise_operand(kinds[0], kinds[1], z, gradient_scale, gradient_shift, gradient_gate,
                         offset, factor, slope, constant, dtype, up),
       depthwise_operand(kinds[2], kinds[3], std::nullopt, forward_scale, forward_shift,
                         forward_gate, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                         dtype, in),
       depthwise_tile(tile), programs, device.stream()});
}

}  // namespace
}  // namespace effkernels

STABLE_TORCH_LIBRARY(effkernels_cuda, m) {
  m.def("activation(Tensor(a!) output, Tensor input, Tensor? upstream, int activation) -> ()");
  m.def(
      "batch_norm_act(Tensor(a!) output, Tensor input, Tensor? residual, Tensor(b!) mean, "
      "Tensor(c!) var, Tensor? weight, Tensor? bias, bool training, float eps, int activation) "
      "-> ()");
  m.def(
      "batch_norm_act_backward(Tensor(a!)? input_gradient, Tensor(b!)? residual_gradient, "
      "Tensor(c!)? weight_gradient, Tensor(d!)? bias_gradient, Tensor(e!)? mean_gradient, "
      "Tensor(f!)? var_gradient, Tensor upstream, Tensor input, Tensor? residual, Tensor mean, "
      "Tensor var, Tensor? weight, Tensor? bias, Tensor? mean_upstream, Tensor? var_upstream, "
      "bool training, float eps, int activation) -> ()");
  m.def("squeeze_excite_fits(Tensor input, int channels, int reduced) -> bool");
  m.def(
      "squeeze_excite(Tensor(a!) output, Tensor input, Tensor reduce_weight, Tensor? reduce_bias, "
      "Tensor expand_weight, Tensor? expand_bias, int activation, int gate_activation) -> ()");
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
  m.def(
      "squeeze_excite_gate(Tensor(a!) gate, Tensor mean, float factor, Tensor reduce_weight, "
      "Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, int activation, "
      "int gate_activation) -> ()");
  m.def(
      "pointwise_conv(Tensor(a!) output, Tensor(b!)? sums, Tensor input, Tensor weight, "
      "Tensor? scale, Tensor? bias, Tensor? gate, Tensor? residual, int activation) -> ()");
  m.def(
      "expand_depthwise(Tensor(a!) output, Tensor(b!)? partials, Tensor input, "
      "Tensor expand_weight, Tensor? expand_scale, Tensor? expand_bias, Tensor taps, "
      "Tensor? scale, Tensor? bias, int[] geometry, int[] config, int activation) -> ()");
  m.def(
      "depthwise_conv(Tensor(a!) output, Tensor(b!)? sums, Tensor(c!)? mean, Tensor(d!)? moments, "
      "Tensor(e!)? workspace, Tensor input, Tensor taps, Tensor? scale, Tensor? bias, Tensor? z, "
      "Tensor? operand_scale, Tensor? operand_shift, Tensor? gate, Tensor? offset, "
      "Tensor? factor, Tensor? slope, Tensor? constant, int[] geometry, int[] between, "
      "bool flipped, int activation, int operand_kind, int operand_activation, int[] tile) -> ()");
  m.def(
      "depthwise_gradient(Tensor(a!)? output, Tensor(b!)? totals, Tensor(c!)? partials, "
      "Tensor upstream, Tensor input, Tensor taps, Tensor? scale, Tensor? z, "
      "Tensor? gradient_scale, Tensor? gradient_shift, Tensor? gradient_gate, Tensor? offset, "
      "Tensor? factor, Tensor? slope, Tensor? constant, Tensor? forward_scale, "
      "Tensor? forward_shift, Tensor? forward_gate, int[] geometry, int[] kinds, int[] tile, "
      "int programs) -> ()");
#if defined(EFFKERNELS_EMULATED)
  m.def("configure(int seed, int capability, int processors, int shared_memory) -> ()");
#endif
}

#if defined(EFFKERNELS_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(effkernels_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(effkernels_cuda, CUDA, m) {
#endif
  m.impl("activation", TORCH_BOX(&effkernels::activation));
  m.impl("batch_norm_act", TORCH_BOX(&effkernels::batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&effkernels::batch_norm_act_backward));
  m.impl("squeeze_excite_fits", TORCH_BOX(&effkernels::gate_fits));
  m.impl("squeeze_excite", TORCH_BOX(&effkernels::squeeze_excite));
  m.impl("squeeze_excite_backward", TORCH_BOX(&effkernels::squeeze_excite_backward));
  m.impl("squeeze_excite_gate_backward", TORCH_BOX(&effkernels::squeeze_excite_gate_backward));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effkernels::squeeze_excite_gate));
  m.impl("expand_depthwise", TORCH_BOX(&effkernels::expand_depthwise));
  m.impl("pointwise_conv", TORCH_BOX(&effkernels::pointwise_conv));
  m.impl("depthwise_conv", TORCH_BOX(&effkernels::depthwise_conv));
  m.impl("depthwise_gradient", TORCH_BOX(&effkernels::depthwise_gradient));
}

#if defined(EFFKERNELS_EMULATED)
namespace {
void configure(int64_t seed, int64_t capability, int64_t processors, int64_t shared_memory) {
  effkernels::emulation::options().seed = static_cast<uint64_t>(seed);
  effkernels::emulation::device() = {static_cast<int>(capability), static_cast<int>(processors),
                                     shared_memory, int64_t{50} << 20};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
}
#endif
