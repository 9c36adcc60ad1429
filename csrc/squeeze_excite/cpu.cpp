// squeeze_excite_gate: gate[n] = gate_activation(expand * activation(reduce * mean[n]))
// squeeze_excite:      output[n, p, c] = gate[n, c] * input[n, p, c], mean over the pixels p
//
// Layout NHWC. The gate reads 2 * reduced * channels weights once per image (common/gate.h). The
// whole op reads the input twice, for the mean and for the product, and writes once.
#include "common/gate.h"
#include "common/reduce.h"
#include "squeeze_excite/squeeze_excite.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

constexpr int64_t kPixelBlock = 64;  // pixels summed by one task, whatever the number of threads

template <class T>
void run(const SqueezeExciteArgs& args) {
  const Images& in = args.in;
  const int64_t channels = in.channels, pixels = in.pixels();
  const int64_t blocks = ceil_div(pixels, kPixelBlock), tasks = in.count * blocks;
  const T* input = static_cast<const T*>(args.input);
  T* output = static_cast<T*>(args.output);
  // [tasks, channels] sums, then per image its mean and gate
  float* sums = scratch(ScratchUse::kBlock, static_cast<size_t>((tasks + 2 * in.count) * channels));
  float* means = sums + tasks * channels;
  float* gates = means + in.count * channels;
  const auto each_block = [&](auto&& body) {
    parallel_for(args.parallel, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t first = task % blocks * kPixelBlock;
        body(task, (task / blocks * pixels + first) * channels,
             min_of(kPixelBlock, pixels - first));
      }
    });
  };
  each_block([&](int64_t task, int64_t start, int64_t rows) {
    for (int64_t c = 0; c < channels; c += Vec::size) {
      const int64_t n = min_of(channels - c, Vec::size);
      Vec total = Vec::set1(0.0f);
      for (int64_t r = 0; r < rows; r++) {
        const T* p = input + start + r * channels + c;
        total = total + (n == Vec::size ? Vec::load(p) : load_first(p, n));
      }
      store_first(total, sums + task * channels + c, n);
    }
  });
  parallel_for(args.parallel, in.count, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      reduce_rows(sums + n * blocks * channels, blocks, channels, 1.0f / static_cast<float>(pixels),
                  means + n * channels);
      gate_row(args.weights, means + n * channels, gates + n * channels);
    }
  });
  each_block([&](int64_t task, int64_t start, int64_t rows) {
    const float* gate = gates + task / blocks * channels;
    for (int64_t r = 0; r < rows; r++) {
      const T* from = input + start + r * channels;
      T* to = output + start + r * channels;
      int64_t c = 0;
      for (; c + Vec::size <= channels; c += Vec::size) {
        (Vec::load(from + c) * Vec::load(gate + c)).store(to + c);
      }
      if (c < channels) {
        const int64_t n = channels - c;
        store_first(load_first(from + c, n) * Vec::load(gate + c, n), to + c, n);
      }
    }
  });
}

}  // namespace

void squeeze_excite_gate(const SqueezeExciteGateArgs& args) {
  const int64_t channels = args.weights.channels;
  parallel_for(args.parallel, args.count, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      gate_row(args.weights, args.mean + n * channels, args.gate + n * channels);
    }
  });
}

void squeeze_excite(const SqueezeExciteArgs& args) {
  args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
