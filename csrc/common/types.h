// Plain types that every kernel shares. Kernels know pointers, sizes and these; never torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace effkernels {

// While it lives, denormal numbers count as zero on this thread. SiLU makes some of everything
// below -91, and an Intel core takes 150 cycles for an instruction that meets one: EfficientNet-B4
// took 134 ms instead of 77. (Always inlined, as it is compiled for several instruction sets.)
template <bool kFlush>
class Denormals {
 public:
#if defined(__x86_64__)
  __attribute__((always_inline)) Denormals() : before_(_mm_getcsr()) {
    constexpr unsigned kBits = 0x8040;  // flush to zero, denormals are zero
    _mm_setcsr(kFlush ? before_ | kBits : before_ & ~kBits);
  }
  __attribute__((always_inline)) ~Denormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  __attribute__((always_inline)) Denormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    constexpr uint64_t kBit = uint64_t{1} << 24;  // flush to zero
    __asm__ volatile("msr fpcr, %0" : : "r"(kFlush ? before_ | kBit : before_ & ~kBit));
  }
  __attribute__((always_inline)) ~Denormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  __attribute__((always_inline)) ~Denormals() {}
#endif
};
using FlushDenormals = Denormals<true>;
using KeepDenormals = Denormals<false>;

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

enum class DType { f32, bf16, f16 };  // f16: on GPUs only

// The order is part of the interface: effkernels/native.py passes the number.
enum class Activation : int64_t { none, relu, relu6, silu, hard_swish, sigmoid, hard_sigmoid };
constexpr int64_t kActivations = 7;

// A sliding window over an image. Right and bottom padding follow from the output's size.
struct Geometry {
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t dilation_h, dilation_w;
  int64_t left, top;
};

// NHWC images: `count` of them, each height x width pixels of `channels` values.
struct Images {
  int64_t count, height, width, channels;

  int64_t pixels() const { return height * width; }
  int64_t size() const { return height * width * channels; }
};

// What happens to a sum on its way to memory:
//   y = activation(scale[c] * x + bias[c] + residual)
// Null pointers leave their term out. `residual` has the output's type and layout.
struct Epilogue {
  const float* scale = nullptr;  // [channels]
  const float* bias = nullptr;   // [channels]
  const void* residual = nullptr;
  Activation activation = Activation::none;
};

// The weights of squeeze-and-excitation, dense float32.
struct SqueezeExciteWeights {
  int64_t channels = 0, reduced = 0;
  const float* reduce_weight = nullptr;  // [reduced, channels]
  const float* reduce_bias = nullptr;    // [reduced] or null
  const float* expand_weight = nullptr;  // [reduced, channels]: transposed
  const float* expand_bias = nullptr;    // [channels] or null
  Activation activation = Activation::silu;
  Activation gate_activation = Activation::sigmoid;
};

// Gradients of those weights; null pointers leave theirs out.
struct SqueezeExciteGradients {
  float* reduce_weight = nullptr;  // [reduced, channels]
  float* reduce_bias = nullptr;    // [reduced]
  float* expand_weight = nullptr;  // [reduced, channels]: transposed
  float* expand_bias = nullptr;    // [channels]
};

// How a kernel asks for threads: `run` calls body(context, begin, end) on disjoint ranges that
// cover [0, tasks). The bindings hand in torch's own pool.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end),
              void* context);
};

template <class F>
void parallel_for(const Parallel& parallel, int64_t tasks, F&& body) {
  if (tasks <= 0) return;
  if (parallel.threads == 1 || tasks == 1) {
    body(int64_t{0}, tasks);
    return;
  }
  using Body = F;
  // A thread that the pool starts now inherits this thread's mode, and keeps it for other code.
  const KeepDenormals keep;
  parallel.run(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        const FlushDenormals flush;
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Output channels side by side in packed weights; effkernels/native.py _PANEL.
constexpr int64_t kPanel = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace effkernels
