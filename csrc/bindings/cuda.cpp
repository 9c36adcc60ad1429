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

}  // namespace
}  // namespace effkernels

STABLE_TORCH_LIBRARY(effkernels_cuda, m) {
  m.def("activation(Tensor(a!) output, Tensor input, Tensor? upstream, int activation) -> ()");
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
