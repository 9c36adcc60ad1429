// squeeze_excite_gate: gate[n] = gate_activation(expand * activation(reduce * mean[n]))
// squeeze_excite:      output[n, p, c] = gate[n, c] * input[n, p, c], mean over the pixels p
//
// Layout NHWC. The gate reads 2 * reduced * channels weights once per image (common/gate.h). The
// whole op reads the input twice, for the mean and for the product, and writes once.
//
// squeeze_excite_backward, with g and h of common/gate_gradient.h, over P pixels:
//   for gate[n, c] = sum over p of upstream[n, p, c] * input[n, p, c]
//   input_gradient[n, p, c] = upstream[n, p, c] * gate[n, c] + for mean[n, c] / P
// Two passes. The first sums the input, too, from which the mean and the gate come once more: so
// nothing but the input is kept. An image per thread goes through both passes, and reads upstream
// the second time from L2. Moves upstream and input once to twice and the gradient once; sums by
// blocks of pixels, joined in a fixed order.
//
// Ladder, gradients of B0's 16 squeeze-and-excitations, batch 16, one thread, medians of one run
// (float32, bfloat16):
//   PyTorch op by op, as torchvision's module has them    128 ms   130 ms
//   these two passes                                       28 ms    21 ms
#include "common/gate_gradient.h"
#include "common/reduce.h"
#include "squeeze_excite/squeeze_excite.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

constexpr int64_t kPixelBlock = 64;  // pixels summed by one task, whatever the number of threads

// out[i] = sums[i] / pixels: a factor 1 / pixels would carry its own rounding into every mean.
void divide_row(const float* sums, int64_t pixels, int64_t count, float* out) {
  const Vec divisor = Vec::set1(static_cast<float>(pixels));
  for (int64_t i = 0; i < count; i += Vec::size) {
    const int64_t n = min_of(count - i, Vec::size);
    (Vec::load(sums + i, n) / divisor).store(out + i, n);
  }
}

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
      float* mean = means + n * channels;
      reduce_rows(sums + n * blocks * channels, blocks, channels, 1.0f, mean);
      divide_row(mean, pixels, channels, mean);
      gate_row(args.weights, mean, gates + n * channels);
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

// ---- Backward

constexpr int kGroup = 4;  // vectors of channels side by side: whole cache lines of every row

// sums = {sum of input, sum of upstream * input} over rows of pixels, [2, channels].
template <class T>
void gradient_sums(const T* upstream, const T* input, int64_t rows, int64_t channels, float* sums) {
  const auto group = [&](int64_t c, auto vectors, int64_t n) EFFKERNELS_LAMBDA_INLINE {
    constexpr int kVectors = decltype(vectors)::value;
    const auto load = [n](const T* p) EFFKERNELS_LAMBDA_INLINE {
      return n == Vec::size ? Vec::load(p) : load_first(p, n);
    };
    for (int64_t begin = 0; begin < rows; begin += kSumRows) {
      Vec totals[kVectors], products[kVectors];
      for (int v = 0; v < kVectors; v++) totals[v] = products[v] = Vec::set1(0.0f);
      for (int64_t r = begin; r < min_of(rows, begin + kSumRows); r++) {
        for (int v = 0; v < kVectors; v++) {
          const int64_t at = r * channels + c + v * Vec::size;
          const Vec x = load(input + at);
          totals[v] = totals[v] + x;
          products[v] = fma(load(upstream + at), x, products[v]);
        }
      }
      const auto add = [n, begin](Vec x, float* p) EFFKERNELS_LAMBDA_INLINE {
        store_first(begin == 0 ? x : x + Vec::load(p, n), p, n);
      };
      for (int v = 0; v < kVectors; v++) {
        add(totals[v], sums + c + v * Vec::size);
        add(products[v], sums + channels + c + v * Vec::size);
      }
    }
  };
  int64_t c = 0;
  for (; c + kGroup * Vec::size <= channels; c += kGroup * Vec::size) {
    group(c, std::integral_constant<int, kGroup>{}, Vec::size);
  }
  for (; c < channels; c += Vec::size) {
    group(c, std::integral_constant<int, 1>{}, min_of(channels - c, Vec::size));
  }
}

// to = upstream * gate + offset over rows of pixels; gate and offset are [channels].
template <class T>
void gradient_rows(const T* upstream, const float* gate, const float* offset, int64_t rows,
                   int64_t channels, T* to) {
  for (int64_t r = 0; r < rows; r++, upstream += channels, to += channels) {
    int64_t c = 0;
    for (; c + Vec::size <= channels; c += Vec::size) {
      fma(Vec::load(upstream + c), Vec::load(gate + c), Vec::load(offset + c)).store(to + c);
    }
    if (c < channels) {
      const int64_t n = channels - c;
      const Vec x = load_first(upstream + c, n);
      store_first(fma(x, Vec::load(gate + c, n), Vec::load(offset + c, n)), to + c, n);
    }
  }
}

template <class T>
void differentiate(const SqueezeExciteBackwardArgs& args) {
  const Images& in = args.in;
  const SqueezeExciteWeights& w = args.weights;
  const int64_t channels = in.channels, pixels = in.pixels();
  const int64_t blocks = ceil_div(pixels, kPixelBlock), vectors = in.count * channels;
  const T* upstream = static_cast<const T*>(args.upstream);
  const T* input = static_cast<const T*>(args.input);
  T* input_gradient = static_cast<T*>(args.input_gradient);
  // Of every image its sums by blocks, [2, channels] each, and what comes of them
  float* sums =
      scratch(ScratchUse::kBlock, static_cast<size_t>(2 * blocks * vectors + 2 * vectors +
                                                      2 * vectors + GateWork::size(w, in.count)));
  float* totals = sums + 2 * blocks * vectors;  // [count, 2, channels]
  float* means = totals + 2 * vectors;
  float* gates = means + vectors;
  const GateWork work = GateWork::in(gates + vectors, w, in.count);

  const auto image = [&](int64_t n, const Parallel& parallel) {
    float* parts = sums + 2 * n * blocks * channels;
    float* total = totals + 2 * n * channels;
    float* offset = total;  // once it has become the mean
    const auto each_block = [&](auto&& body) {
      parallel_for(parallel, blocks, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b++) {
          const int64_t first = b * kPixelBlock;
          body(b, (n * pixels + first) * channels, min_of(kPixelBlock, pixels - first));
        }
      });
    };
    each_block([&](int64_t b, int64_t start, int64_t rows) {
      gradient_sums(upstream + start, input + start, rows, channels, parts + 2 * b * channels);
    });
    reduce_rows(parts, blocks, 2 * channels, 1.0f, total);
    divide_row(total, pixels, channels, means + n * channels);
    gate_gradient_row(w, means + n * channels, total + channels, n, work,
                      input_gradient == nullptr ? nullptr : offset, gates + n * channels);
    if (input_gradient == nullptr) return;
    divide_row(offset, pixels, channels, offset);
    each_block([&](int64_t, int64_t start, int64_t rows) {
      gradient_rows(upstream + start, gates + n * channels, offset, rows, channels,
                    input_gradient + start);
    });
  };
  // An image per thread, which is still in its caches when it is read again; else all threads on
  // one image.
  const int64_t threads = args.parallel.threads;
  if (in.count % threads == 0 || in.count >= 4 * threads) {
    parallel_for(args.parallel, in.count, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) image(n, {1, nullptr});
    });
  } else {
    for (int64_t n = 0; n < in.count; n++) image(n, args.parallel);
  }
  gate_weight_gradients(w, means, in.count, work, args.gradients, args.parallel);
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

void squeeze_excite_gate_backward(const SqueezeExciteGateBackwardArgs& args) {
  const SqueezeExciteWeights& w = args.weights;
  const GateWork work =
      GateWork::in(scratch(ScratchUse::kBlock, static_cast<size_t>(GateWork::size(w, args.count))),
                   w, args.count);
  parallel_for(args.parallel, args.count, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t at = n * w.channels;
      gate_gradient_row(w, args.mean + at, args.upstream + at, n, work,
                        args.mean_gradient == nullptr ? nullptr : args.mean_gradient + at, nullptr);
    }
  });
  gate_weight_gradients(w, args.mean, args.count, work, args.gradients, args.parallel);
}

void squeeze_excite_backward(const SqueezeExciteBackwardArgs& args) {
  args.dtype == DType::f32 ? differentiate<float>(args) : differentiate<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
