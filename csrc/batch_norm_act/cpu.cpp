// batch_norm_act: output[p, c] = activation((input[p, c] - mean[c]) / sqrt(var[c] + eps) *
// weight[c]
//                                          + bias[c] + residual[p, c])
//
// Layout NHWC, p over all pixels of all images. Inference moves input and output once. Training
// reads the input once more for the statistics: blocks of pixels, each around its own mean so
// that no large number is subtracted from another, joined in double in a fixed order.
#include "batch_norm_act/batch_norm_act.h"
#include "common/activation.h"
#include "common/scratch.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

constexpr int64_t kPixelBlock = 128;  // pixels of one partial result, whatever the threads

// Of one block of rows: a center close to the mean, the mean's offset from it (what rounding left,
// too small for the center's own bits), and the sum of squared distances from the center.
template <class T>
void block_statistics(const T* rows, int64_t count, int64_t channels, float* mean, float* offset,
                      float* m2) {
  for (int64_t c = 0; c < channels; c += Vec::size) {
    const int64_t n = min_of(channels - c, Vec::size);
    const auto row = [&](int64_t r) {
      const T* p = rows + r * channels + c;
      return n == Vec::size ? Vec::load(p) : load_first(p, n);
    };
    Vec total = Vec::set1(0.0f);
    for (int64_t r = 0; r < count; r++) total = total + row(r);
    const Vec center = total * Vec::set1(1.0f / static_cast<float>(count));
    Vec squares = Vec::set1(0.0f), rest = Vec::set1(0.0f);
    for (int64_t r = 0; r < count; r++) {
      const Vec distance = row(r) - center;
      squares = fma(distance, distance, squares);
      rest = rest + distance;
    }
    store_first(center, mean + c, n);
    store_first(rest * Vec::set1(1.0f / static_cast<float>(count)), offset + c, n);
    store_first(squares, m2 + c, n);
  }
}

template <class T>
void statistics(const BatchNormActArgs& args, int64_t pixels) {
  const int64_t channels = args.in.channels, blocks = ceil_div(pixels, kPixelBlock);
  float* means = scratch(ScratchUse::kBlock, static_cast<size_t>(3 * blocks * channels));
  float* offsets = means + blocks * channels;
  float* m2s = offsets + blocks * channels;
  parallel_for(args.parallel, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * kPixelBlock;
      block_statistics(static_cast<const T*>(args.input) + first * channels,
                       min_of(kPixelBlock, pixels - first), channels, means + b * channels,
                       offsets + b * channels, m2s + b * channels);
    }
  });
  parallel_for(args.parallel, channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      double mean = 0.0, m2 = 0.0, count = 0.0;
      for (int64_t b = 0; b < blocks; b++) {  // Chan, Golub & LeVeque, 1979
        const double size = static_cast<double>(min_of(kPixelBlock, pixels - b * kPixelBlock));
        const double offset = offsets[b * channels + c];
        const double distance = means[b * channels + c] + offset - mean;
        m2 += m2s[b * channels + c] - size * offset * offset +
              distance * distance * count * size / (count + size);
        mean += distance * size / (count + size);
        count += size;
      }
      args.mean[c] = static_cast<float>(mean);
      args.var[c] = static_cast<float>(m2 < 0.0 ? 0.0 : m2 / count);
    }
  });
}

template <class T>
void run(const BatchNormActArgs& args) {
  const int64_t channels = args.in.channels, pixels = args.in.count * args.in.pixels();
  if (pixels == 0) return;
  if (args.training) statistics<T>(args, pixels);
  float* scale = scratch(ScratchUse::kBlock, static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; c++) {
    scale[c] = static_cast<float>((args.weight == nullptr ? 1.0 : args.weight[c]) /
                                  __builtin_sqrt(static_cast<double>(args.var[c]) + args.eps));
  }
  const T* input = static_cast<const T*>(args.input);
  const T* residual = static_cast<const T*>(args.residual);
  T* output = static_cast<T*>(args.output);
  const int64_t blocks = ceil_div(pixels, kPixelBlock);
  with_activation(args.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    parallel_for(args.parallel, blocks, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin * kPixelBlock; p < min_of(pixels, end * kPixelBlock); p++) {
        const int64_t start = p * channels;
        for (int64_t c = 0; c < channels; c += Vec::size) {
          const int64_t n = min_of(channels - c, Vec::size), at = start + c;
          const bool whole = n == Vec::size;
          const auto load = [&](const auto* p) EFFKERNELS_LAMBDA_INLINE {
            return whole ? Vec::load(p) : load_first(p, n);
          };
          // The mean goes first: folded into the bias it would cancel where it is large.
          const Vec centered = load(input + at) - load(args.mean + c);
          const Vec bias = args.bias == nullptr ? Vec::set1(0.0f) : load(args.bias + c);
          Vec x = fma(centered, load(scale + c), bias);
          if (residual != nullptr) x = x + load(residual + at);
          x = activate<kActivation>(x);
          if (whole) {
            x.store(output + at);
          } else {
            store_first(x, output + at, n);
          }
        }
      }
    });
  });
}

}  // namespace

void batch_norm_act(const BatchNormActArgs& args) {
  args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
