// effkernels_cuda::<op>: the CUDA kernels as PyTorch ops, through the stable ABI.
//
// effkernels/cuda is the only caller: it has checked shapes, made every tensor dense (NHWC for
// images) and allocated the outputs. With EFFKERNELS_EMULATED the same ops take CPU tensors, and
// the kernels run on an emulated GPU: so this file is tested, too.
#define EFFKERNELS_CUDA
#include "depthwise_conv/cuda.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/arguments.h"
#include "silu/cuda.h"

#if defined(EFFKERNELS_EMULATED)
#include "common/emulation.h"
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
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
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream_));
  }
#endif

  void* stream() const { return stream_; }

 private:
#if !defined(EFFKERNELS_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

void activation(Tensor output, Tensor input, OptionalTensor upstream, int64_t activation) {
  const OnDevice device(input);
  const DType dtype = dtype_of(input);
  const int64_t size = input.numel();
  activation_cuda({dtype, writable("output", output, dtype, size), input.const_data_ptr(),
                   residual_of(upstream, dtype, size), size, activation_of(activation),
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
