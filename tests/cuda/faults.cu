// Kernels with one mistake each, and the same without: tests/cuda/test_emulation.py runs them by
// name and expects the emulated GPU to name the mistake.
#include <cstdio>
#include <functional>
#include <map>
#include <vector>

#include "common/cuda.h"

namespace effkernels {
namespace {

constexpr int kThreads = 64;

enum Fault { kNone, kWrong };

// Each thread reads what its neighbour in the other warp wrote.
template <Fault kFault>
__global__ void barrier_kernel(float* output) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<float>(t);
  if (kFault == kNone) __syncthreads();
  output[t] = shared[kThreads - 1 - t];
}

// __syncwarp orders the lanes of a warp, not those of two.
template <Fault kFault>
__global__ void warp_barrier_kernel(float* output) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<float>(t);
  __syncwarp();
  output[t] = shared[kFault == kNone ? (t ^ 5) : kThreads - 1 - t];
}

// The buffer is used again while others still read it.
template <Fault kFault>
__global__ void reuse_kernel(float* output) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int round = 0; round < 2; round++) {
    shared[t] = static_cast<float>(t + round);
    __syncthreads();
    sum += shared[(t + 33) % kThreads];
    if (kFault == kNone) __syncthreads();
  }
  output[t] = sum;
}

template <Fault kFault>
__global__ void unwritten_kernel(float* output) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  if (kFault == kNone || t != 7) shared[t] = 1.0f;
  __syncthreads();
  output[t] = shared[t];
}

template <Fault kFault>
__global__ void divergent_kernel(float* output) {
  const int t = static_cast<int>(threadIdx.x);
  if (kFault == kWrong && t >= 40) return;
  __syncthreads();
  output[t] = 1.0f;
}

template <Fault kFault>
__global__ void two_barriers_kernel(float* output) {
  const int t = static_cast<int>(threadIdx.x);
  if (kFault == kWrong && t % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
    if (kFault == kNone) __syncwarp();
  }
  output[t] = 1.0f;
}

template <Fault kFault>
__global__ void shuffle_kernel(float* output) {
  const int t = static_cast<int>(threadIdx.x);
  float sum = static_cast<float>(t);
  if (kFault == kNone || t % 32 < 16) sum = warp_sum(sum);
  output[t] = sum;
}

template <Fault kFault>
__global__ void copy_kernel(float* output, const float* input) {
  unsigned char* shared = dynamic_shared();
  const int t = static_cast<int>(threadIdx.x);
  copy_async(shared + 16 * t, input + 4 * t, true);
  commit_copies();
  copy_async(shared + 16 * (kThreads + t), input + 4 * t, false);
  commit_copies();
  wait_copies<(kFault == kNone ? 1 : 2)>();
  output[t] = reinterpret_cast<float*>(shared)[4 * t];
  wait_copies<0>();
}

template <Fault kFault>
__global__ void copy_barrier_kernel(float* output, const float* input) {
  unsigned char* shared = dynamic_shared();
  const int t = static_cast<int>(threadIdx.x);
  copy_async(shared + 16 * t, input + 4 * t, true);
  commit_copies();
  wait_copies<0>();
  if (kFault == kNone) __syncthreads();
  output[t] = reinterpret_cast<float*>(shared)[4 * (kThreads - 1 - t)];
}

template <Fault kFault>
__global__ void blocks_kernel(float* output) {  // two blocks write the same value
  const int block = kFault == kNone ? static_cast<int>(blockIdx.x) : 0;
  output[block * kThreads + static_cast<int>(threadIdx.x)] = 1.0f;
}

template <Fault kFault>
__global__ void aligned_kernel(float* output, const float* input) {
  const int t = static_cast<int>(threadIdx.x);
  const Words words = load_words(input + 4 * t + (kFault == kNone ? 0 : 1));
  output[t] = words.value[0];
}

template <Fault kFault>
__global__ void outside_kernel(float* output) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  shared[t + (kFault == kNone ? 0 : kThreads + 1)] = 1.0f;
  output[t] = 1.0f;
}

template <Fault kFault>
void run(const std::string& name) {
  static std::vector<float> output(2 * kThreads, -1.0f), input(8 * kThreads, 3.0f);
  float* y = output.data();
  // As aligned as torch's memory.
  const float* x = input.data();
  while (!is_aligned(x)) x++;
  constexpr int64_t kShared = 4 * kThreads;
  const std::map<std::string, std::function<void()>> cases = {
      {"barrier", [&] { launch(barrier_kernel<kFault>, 1, kThreads, kShared, nullptr, y); }},
      {"warp_barrier",
       [&] { launch(warp_barrier_kernel<kFault>, 1, kThreads, kShared, nullptr, y); }},
      {"reuse", [&] { launch(reuse_kernel<kFault>, 1, kThreads, kShared, nullptr, y); }},
      {"unwritten", [&] { launch(unwritten_kernel<kFault>, 1, kThreads, kShared, nullptr, y); }},
      {"divergent", [&] { launch(divergent_kernel<kFault>, 1, kThreads, 0, nullptr, y); }},
      {"two_barriers", [&] { launch(two_barriers_kernel<kFault>, 1, kThreads, 0, nullptr, y); }},
      {"shuffle", [&] { launch(shuffle_kernel<kFault>, 1, kThreads, 0, nullptr, y); }},
      {"copy", [&] { launch(copy_kernel<kFault>, 1, kThreads, 8 * kShared, nullptr, y, x); }},
      {"copy_barrier",
       [&] { launch(copy_barrier_kernel<kFault>, 1, kThreads, 4 * kShared, nullptr, y, x); }},
      {"blocks", [&] { launch(blocks_kernel<kFault>, 2, kThreads, 0, nullptr, y); }},
      {"aligned", [&] { launch(aligned_kernel<kFault>, 1, kThreads, 0, nullptr, y, x); }},
      {"outside", [&] { launch(outside_kernel<kFault>, 1, kThreads, kShared, nullptr, y); }},
      {"shared_memory",
       [&] {
         launch(barrier_kernel<kNone>, 1, kThreads, kFault == kNone ? kShared : 1 << 20, nullptr,
                y);
       }},
      {"threads",
       [&] { launch(blocks_kernel<kNone>, 1, kFault == kNone ? 64 : 2048, 0, nullptr, y); }},
  };
  cases.at(name)();
}

}  // namespace
}  // namespace effkernels

int main(int count, char** arguments) {
  const std::string name = arguments[1];
  if (count > 3) effkernels::emulation::options().seed = std::stoull(arguments[3]);
  try {
    arguments[2] == std::string("wrong") ? effkernels::run<effkernels::kWrong>(name)
                                         : effkernels::run<effkernels::kNone>(name);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
