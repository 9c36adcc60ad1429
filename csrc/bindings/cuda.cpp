// effkernels_cuda::<op>: the CUDA kernels as PyTorch ops, through the stable ABI.
//
// effkernels/cuda is the only caller: it has checked shapes, made every tensor dense (NHWC for
// images) and allocated the outputs. With EFFKERNELS_EMULATED the same ops take CPU tensors, and
// the kernels run on an emulated GPU: so this file is tested, too.
#define EFFKERNELS_CUDA
#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/arguments.h"
#include "pointwise_conv/cuda.h"
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

// A tensor of `input`'s dtype, or null.
const void* values_of(const char* name, const OptionalTensor& tensor, DType dtype, int64_t size) {
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
  args.weight = values_of("weight", weight, args.dtype, args.outputs * in.channels);
  args.scale = floats("scale", scale, args.outputs);
  args.bias = floats("bias", bias, args.outputs);
  args.gate = values_of("gate", gate, args.dtype, in.count * in.channels);
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

}  // namespace
}  // namespace effkernels

STABLE_TORCH_LIBRARY(effkernels_cuda, m) {
  m.def("activation(Tensor(a!) output, Tensor input, Tensor? upstream, int activation) -> ()");
  m.def(
      "pointwise_conv(Tensor(a!) output, Tensor(b!)? sums, Tensor input, Tensor weight, "
      "Tensor? scale, Tensor? bias, Tensor? gate, Tensor? residual, int activation) -> ()");
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
  m.impl("pointwise_conv", TORCH_BOX(&effkernels::pointwise_conv));
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
