// activation: output[i] = activation(input[i])
// backward:   output[i] = upstream[i] * activation'(input[i])
//
// Moves every tensor once and computes little, so all that counts is to keep memory busy: a thread
// has 4 vectors of 16 bytes under way (2 of each tensor in the backward pass) before it works on
// the first. An H100 needs about 14 KB a processor on the way at 3.0 TB/s and 600 ns; a block of
// 256 threads has 16 KB, and by registers at least 4 blocks fit.
// SiLU is two trips to the special function unit a value, 16 a clock and processor: in 2-byte types
// 1.1 of the 1.3 ps a value that memory takes. No GPU has run this.
//
// promise: activation_kernel<.*> threads 256, shared 0, warps 32, loads 16, stores 16
#include "common/cuda.h"
#include "silu/cuda.h"

namespace effkernels {
namespace {

constexpr int kThreads = 256;

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(T* output, const T* input, const T* upstream, int64_t size, bool aligned,
                      Activation activation) {
  constexpr int kUnroll = kBackward ? 2 : 4;
  const int64_t block = int64_t{blockIdx.x} * (kThreads * kUnroll * kVector<T>);
  int64_t left[kUnroll];
  float x[kUnroll][kVector<T>], t[kUnroll][kVector<T>];
  Words input_words[kUnroll], upstream_words[kUnroll];
  const bool whole = aligned && size - block >= kThreads * kUnroll * kVector<T>;
  input += block;
  output += block;
  if (kBackward) upstream += block;
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * kVector<T>;
    left[i] = size - block - at;
    if (whole) {
      input_words[i] = load_words(input + at);
      if (kBackward) upstream_words[i] = load_words(upstream + at);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * kVector<T>;
    const int count = static_cast<int>(left[i] < kVector<T> ? left[i] : kVector<T>);
    if (whole) {
      unpack<T>(input_words[i], x[i]);
      if (kBackward) unpack<T>(upstream_words[i], t[i]);
    } else if (count > 0) {
      load(input + at, count, aligned, x[i]);
      if (kBackward) load(upstream + at, count, aligned, t[i]);
    } else {
      continue;
    }
    with_activation(activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant){}();
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) {
        x[i][j] =
            kBackward ? t[i][j] * slope<kActivation>(x[i][j]) : activate<kActivation>(x[i][j]);
      }
    });
    store(output + at, count, aligned, x[i]);
  }
}

template <class T, bool kBackward>
void run(const ActivationCuda& args) {
  constexpr int64_t kBlock = kThreads * (kBackward ? 2 : 4) * kVector<T>;
  launch(activation_kernel<T, kBackward>, dim3(static_cast<unsigned>(ceil_div(args.size, kBlock))),
         kThreads, 0, args.stream, static_cast<T*>(args.output), static_cast<const T*>(args.input),
         static_cast<const T*>(args.upstream), args.size,
         is_aligned(args.output) && is_aligned(args.input) && is_aligned(args.upstream),
         args.activation);
}

template <class T>
void run(const ActivationCuda& args) {
  args.upstream ? run<T, true>(args) : run<T, false>(args);
}

}  // namespace

void activation_cuda(const ActivationCuda& args) {
  with_dtype(args.dtype, [&](auto value) { run<decltype(value)>(args); });
}

}  // namespace effkernels
