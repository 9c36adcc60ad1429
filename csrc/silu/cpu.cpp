// silu: output[i] = activation(input[i]) for dense tensors of the same layout.
//
// Moves input and output once; about 20 operations a vector for silu (common/activation.h), so it
// runs at memory speed beyond the caches.
#include "common/activation.h"
#include "silu/silu.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // values per task: 16 KiB in, half of an L1

template <class T>
void run(const SiluArgs& args) {
  const T* input = static_cast<const T*>(args.input);
  T* output = static_cast<T*>(args.output);
  parallel_for(args.parallel, ceil_div(args.size, kBlock), [&](int64_t begin, int64_t end) {
    const int64_t last = min_of(args.size, end * kBlock);
    with_activation(args.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      int64_t i = begin * kBlock;
      for (; i + Vec::size <= last; i += Vec::size) {
        activate<kActivation>(Vec::load(input + i)).store(output + i);
      }
      if (i < last) {
        store_first(activate<kActivation>(load_first(input + i, last - i)), output + i, last - i);
      }
    });
  });
}

}  // namespace

void silu(const SiluArgs& args) { args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args); }

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
