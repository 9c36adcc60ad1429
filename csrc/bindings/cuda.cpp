// effkernels_cuda::<op>: the CUDA kernels as PyTorch ops, through the stable ABI.
//
// effkernels/cuda is the only caller: it has checked shapes, made every tensor dense (NHWC for
// images) and allocated the outputs. With EFFKERNELS_EMULATED the same ops take CPU tensors, and
// the kernels run on an emulated GPU: so this file is tested, too.
#define EFFKERNELS_CUDA
#include "silu/cuda.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/arguments.h"
#include "squeeze_excite/cuda.h"

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

// A vector of `dtype` or of float32.
Values values_of(const char* name, const OptionalTensor& tensor, DType dtype, int64_t size) {
  if (!tensor) return {};
  const DType found = dtype_of(*tensor);
  STD_TORCH_CHECK(found == dtype || found == DType::f32, EFFKERNELS_LIBRARY, name,
                  " has another dtype");
  check_size(name, *tensor, size);
  return {tensor->const_data_ptr(), found == DType::f32};
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

}  // namespace
}  // namespace effkernels

STABLE_TORCH_LIBRARY(effkernels_cuda, m) {
  m.def("activation(Tensor(a!) output, Tensor input, Tensor? upstream, int activation) -> ()");
  m.def("squeeze_excite_fits(Tensor input, int channels, int reduced) -> bool");
  m.def(
      "squeeze_excite_gate(Tensor(a!) gate, Tensor mean, float factor, Tensor reduce_weight, "
      "Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, int activation, "
      "int gate_activation) -> ()");
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
  m.impl("squeeze_excite_fits", TORCH_BOX(&effkernels::gate_fits));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effkernels::squeeze_excite_gate));
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
