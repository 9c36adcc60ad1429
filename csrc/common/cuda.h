// What the GPU kernels share, and everything of CUDA's that they use beyond the language: 16-byte
// accesses, 2-byte types, asynchronous copies, tensor cores, launches.
//
// A kernel file compiles twice: by nvcc, and as host C++ under emulation.h, which runs the same
// kernels thread by thread (tests/cuda). So inline PTX stands in this file alone, each behind a
// function whose host twin is beside it; shared memory comes from `dynamic_shared` alone; and the
// only launches are those of `launch`. Kernels are for compute capability 8.0 and later.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/types.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "common/emulation.h"
#endif

namespace effkernels {

// Values that one 16-byte access moves.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Two 2-byte values, or four bytes of anything.
typedef uint32_t __attribute__((may_alias)) Word;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- 2-byte types: always two at a time, which is how the hardware converts and stores them.

// {low, high} rounded to nearest even, as two values side by side in memory.
template <class T>
__device__ inline uint32_t pack2(float low, float high);

template <>
__device__ inline uint32_t pack2<bf16>(float low, float high) {
#if defined(__CUDACC__)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return emulation::to_bf16(low) | uint32_t{emulation::to_bf16(high)} << 16;
#endif
}

template <>
__device__ inline uint32_t pack2<f16>(float low, float high) {
#if defined(__CUDACC__)
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return emulation::to_f16(low) | uint32_t{emulation::to_f16(high)} << 16;
#endif
}

template <class T>
__device__ inline float2 unpack2(uint32_t packed);

template <>
__device__ inline float2 unpack2<bf16>(uint32_t packed) {
#if defined(__CUDACC__)
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
#else
  return {emulation::from_bf16(static_cast<uint16_t>(packed)),
          emulation::from_bf16(static_cast<uint16_t>(packed >> 16))};
#endif
}

template <>
__device__ inline float2 unpack2<f16>(uint32_t packed) {
#if defined(__CUDACC__)
  float2 values;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(packed));
  return values;
#else
  return {emulation::from_f16(static_cast<uint16_t>(packed)),
          emulation::from_f16(static_cast<uint16_t>(packed >> 16))};
#endif
}

// The products of two pairs, rounded as `pack2` rounds.
template <class T>
__device__ inline uint32_t multiply2(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t multiply2<bf16>(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t product;  // a * b - 0: there is no product of two bf16x2 before sm_90
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
#else
  const float2 x = unpack2<bf16>(a), y = unpack2<bf16>(b);
  return pack2<bf16>(x.x * y.x, x.y * y.y);
#endif
}

template <>
__device__ inline uint32_t multiply2<f16>(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
#else
  const float2 x = unpack2<f16>(a), y = unpack2<f16>(b);
  return pack2<f16>(x.x * y.x, x.y * y.y);
#endif
}

// A float as the four bytes that it is in memory, and back.
__device__ inline uint32_t float_word(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
#endif
}
__device__ inline float word_float(uint32_t word) {
#if defined(__CUDACC__)
  return __uint_as_float(word);
#else
  float value;
  std::memcpy(&value, &word, 4);
  return value;
#endif
}

__device__ inline float to_float(float value) { return value; }
template <class T>
__device__ inline float to_float(T value) {
  return unpack2<T>(value.bits).x;
}

template <class T>
__device__ inline T from_float(float value) {
  return T{static_cast<uint16_t>(pack2<T>(value, 0.0f))};
}
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}

// ---- Accesses of 16 and of 4 or 8 bytes; pointers are aligned to as much.

// A vector as it lies in memory; `words` is what one access moves.
union alignas(16) Words {
  uint4 words;
  uint32_t word[4];
  float value[4];
};

__device__ inline Words load_words(const void* from) {
  Words result;
  result.words = *static_cast<const uint4*>(from);
  return result;
}

__device__ inline void store_words(void* to, const Words& words) {
  *static_cast<uint4*>(to) = words.words;
}

// The same to global memory for certain in one access: of `store_words` the compiler may make four
// of 4 bytes, where it sees the words apart.
__device__ inline void store_global(void* to, const Words& words) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.word[0]),
               "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
               : "memory");
#else
  store_words(to, words);
#endif
}

template <class T>
__device__ inline void unpack(const Words& words, float (&values)[kVector<T>]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = words.value[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = unpack2<T>(words.word[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
__device__ inline Words pack(const float (&values)[kVector<T>]) {
  Words words;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) words.value[i] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) words.word[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  }
  return words;
}

// `kValues` values from `from` as floats, of which the first `count` exist; the others are zero.
// One access where all of them do and `aligned` says that `from` is a multiple of 16 bytes.
template <class T>
__device__ inline void load(const T* from, int count, bool aligned, float (&values)[kVector<T>]) {
  if (aligned && count >= kVector<T>) {
    unpack<T>(load_words(from), values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) values[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <class T>
__device__ inline void store(T* to, int count, bool aligned, const float (&values)[kVector<T>]) {
  if (aligned && count >= kVector<T>) {
    store_words(to, pack<T>(values));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if (i < count) to[i] = from_float<T>(values[i]);
  }
}

// Two neighbouring values: 4 bytes of a 2-byte type, 8 of float.
__device__ inline float2 load2(const float* from) { return *reinterpret_cast<const float2*>(from); }
template <class T>
__device__ inline float2 load2(const T* from) {
  return unpack2<T>(*reinterpret_cast<const Word*>(from));
}
__device__ inline void store2(float* to, float2 values) { *reinterpret_cast<float2*>(to) = values; }
template <class T>
__device__ inline void store2(T* to, float2 values) {
  *reinterpret_cast<Word*>(to) = pack2<T>(values.x, values.y);
}

// ---- Arithmetic

// With -ftz=true, as the library is compiled, these leave out the instructions that would keep
// denormal results: a SiLU is 6 instead of about 12. (As asm they bound the compiler's hands, and
// one kernel spilled.)
__device__ inline float exp_fast(float x) {  // one multiply and one trip to the special unit
#if defined(__CUDACC__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

__device__ inline float divide_fast(float x, float y) {  // 0 for |y| > 2^126
#if defined(__CUDACC__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

__device__ inline float sigmoid(float x) { return divide_fast(1.0f, 1.0f + exp_fast(-x)); }

__device__ inline float clamp(float x, float low, float high) {  // NaN stays NaN
  return x < low ? low : x > high ? high : x;
}

template <Activation kActivation>
__device__ inline float activate(float x) {
  switch (kActivation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;
    case Activation::relu6:
      return clamp(x, 0.0f, 6.0f);
    case Activation::silu:
      return divide_fast(x, 1.0f + exp_fast(-x));
    case Activation::hard_swish:
      return x * clamp(x * (1.0f / 6) + 0.5f, 0.0f, 1.0f);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::hard_sigmoid:
      return clamp(x * (1.0f / 6) + 0.5f, 0.0f, 1.0f);
  }
  return x;
}

__device__ inline float tanh_fast(float x) {  // within 2^-11 of itself: one trip
#if defined(__CUDACC__)
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return word_float(emulation::to_tf32(std::tanh(x)));  // as inexact
#endif
}

// `activate` for a result that will be rounded to T. In bfloat16 the sigmoid comes from tanh, one
// trip to the special function unit in place of two: its error, 2^-12, is a sixteenth of what
// rounding costs a value near 1.
template <class T, Activation kActivation>
__device__ inline float activate_as(float x) {
  if constexpr (std::is_same_v<T, bf16> && kActivation == Activation::silu) {
    const float half = 0.5f * x;
    return half * tanh_fast(half) + half;
  } else if constexpr (std::is_same_v<T, bf16> && kActivation == Activation::sigmoid) {
    return 0.5f * tanh_fast(0.5f * x) + 0.5f;
  } else {
    return activate<kActivation>(x);
  }
}

// The derivative at x, PyTorch's choice at the corners.
template <Activation kActivation>
__device__ inline float slope(float x) {
  switch (kActivation) {
    case Activation::none:
      return 1.0f;
    case Activation::relu:
      return x > 0.0f ? 1.0f : 0.0f;
    case Activation::relu6:
      return x > 0.0f && x < 6.0f ? 1.0f : 0.0f;
    case Activation::silu: {
      const float s = sigmoid(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::hard_swish:
      return x <= -3.0f ? 0.0f : x < 3.0f ? x * (1.0f / 3) + 0.5f : 1.0f;
    case Activation::sigmoid: {
      const float s = sigmoid(x);
      return s * (1.0f - s);
    }
    case Activation::hard_sigmoid:
      return x > -3.0f && x < 3.0f ? 1.0f / 6 : 0.0f;
  }
  return 1.0f;
}

// Calls f(constant of this activation): one uniform branch, then code for that activation alone.
// `constant()` is the Activation.
template <Activation kActivation>
struct ActivationConstant {
  __host__ __device__ constexpr Activation operator()() const { return kActivation; }
};

template <class F>
__device__ inline void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::none:
      return f(ActivationConstant<Activation::none>{});
    case Activation::relu:
      return f(ActivationConstant<Activation::relu>{});
    case Activation::relu6:
      return f(ActivationConstant<Activation::relu6>{});
    case Activation::silu:
      return f(ActivationConstant<Activation::silu>{});
    case Activation::hard_swish:
      return f(ActivationConstant<Activation::hard_swish>{});
    case Activation::sigmoid:
      return f(ActivationConstant<Activation::sigmoid>{});
    case Activation::hard_sigmoid:
      return f(ActivationConstant<Activation::hard_sigmoid>{});
  }
}

template <int N>
__device__ inline void activate_all(Activation activation, float (&values)[N]) {
  with_activation(activation, [&](auto constant) {
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = activate<decltype(constant){}()>(values[i]);
  });
}

// threadIdx.x, read anew: what follows from it is not kept in registers from before.
__device__ inline int thread_anew() {
#if defined(__CUDACC__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 1023;  // the compiler knows no range of it
#else
  return static_cast<int>(threadIdx.x);
#endif
}

__device__ inline float warp_sum(float value) {  // of all 32 lanes, in each
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// ---- Shared memory

// The block's shared memory, as many bytes as its launch asked for, aligned to 16.
__device__ inline unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 effkernels_shared[];
  return reinterpret_cast<unsigned char*>(effkernels_shared);
#else
  return emulation::shared_memory();
#endif
}

#if defined(__CUDACC__)
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// 16 bytes from global to shared memory past the registers; zeros if not `inside`. They are there
// for this thread after `wait_copies`, for others after a barrier behind that.
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
#else
  emulation::copy_async(shared, global, 16, inside);
#endif
}

// The same without a branch around it: nothing happens unless `asked`.
__device__ inline void copy_async_if(bool asked, void* shared, const void* global, bool inside) {
#if defined(__CUDACC__)
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %3, 0;\n"
      "@p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(shared_address(shared)),
      "l"(global), "r"(inside ? 16 : 0), "r"(static_cast<int>(asked))
      : "memory");
#else
  if (asked) emulation::copy_async(shared, global, 16, inside);
#endif
}

// Ends a group of copies.
__device__ inline void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits until at most the `kPending` latest groups of this thread are under way.
template <int kPending>
__device__ inline void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulation::wait_copies(kPending);
#endif
}

// ---- Tensor cores. Fragments are laid out as PTX's manual says for mma.m16n8k16 and ldmatrix.

// Four 8x8 matrices of 2-byte values; lane l names the 16 bytes of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulation::load_matrices(fragment, row);
#endif
}

// sum[16, 8] += a[16, 16] * b[16, 8], float32 sums of 2-byte products.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulation::multiply_add(sum, a, b, [](uint32_t packed, float* pair) {
    const float2 values = unpack2<T>(packed);
    pair[0] = values.x;
    pair[1] = values.y;
  });
#endif
}

// `value` as tensor cores see a float: 10 bits of fraction, rounded to nearest.
__device__ inline uint32_t to_tf32(float value) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return emulation::to_tf32(value);
#endif
}

// sum[16, 8] += a[16, 8] * b[8, 8] of tf32 values: mma.m16n8k8.
__device__ inline void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulation::multiply_add_tf32(sum, a, b);
#endif
}

// ---- Launches and devices

// Calls f(value of the type that `dtype` names).
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

// Whether 16-byte accesses may begin at this pointer.
__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

struct DeviceProperties {
  int capability;         // 90 for compute capability 9.0
  int processors;         // streaming multiprocessors
  int64_t shared_memory;  // bytes that one block may have
  int64_t l2;             // bytes
};

using Stream = void*;  // cudaStream_t

#if defined(__CUDACC__)
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Of the current device; asked for once.
inline const DeviceProperties& device_properties() {
  constexpr int kDevices = 64;
  static DeviceProperties known[kDevices];
  static std::once_flag asked[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  std::call_once(asked[device % kDevices], [device] {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
      return value;
    };
    DeviceProperties& found = known[device % kDevices];
    found.processors = ask(cudaDevAttrMultiProcessorCount);
    found.shared_memory = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found.l2 = ask(cudaDevAttrL2CacheSize);
    found.capability =
        10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  });
  return known[device % kDevices];
}

// Runs `kernel` with `shared` bytes of shared memory a block. Throws what CUDA says of it; nothing
// happens for an empty grid.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, Stream stream,
            Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for a parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "cudaFuncSetAttribute");
  }
  const auto run = [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    check(cudaLaunchKernel(address, grid, dim3(static_cast<unsigned>(threads)), pointers,
                           static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)),
          "launch");
  };
  run(static_cast<Parameters>(arguments)...);
}
#else
inline const DeviceProperties& device_properties() {
  static DeviceProperties properties;
  const emulation::Device& device = emulation::device();
  properties = {device.capability, device.processors, device.shared_memory, device.l2};
  return properties;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, Stream,
            Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for a parameter");
  emulation::launch(grid, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
}
#endif

}  // namespace effkernels
