// depthwise_conv: output[n, y, x, c] = epilogue(sum over taps of weight[tap, c] * input[...])
//
// Layout NHWC. Moves each input row kernel_h times through L1/L2 and each output once; 2 * k * k
// operations a value: bound by L1 loads (one per fma). Rows of the output are independent tasks.
// The mean comes from per-row sums, added in the order of the rows, so that it does not depend on
// how many threads ran.
//
// depthwise_conv_backward:
//   input_gradient[n, y, x, c]   = sum over taps of weight[tap, c] * upstream[output of (y, x,
//   tap)] weight_gradient[tap, c]      = sum over outputs of upstream[output, c] * input[...]
// Each moves both its images once, and every row of one of them kernel_h times through L1/L2. The
// input gradient gathers for each pixel the outputs that it went into, whatever the stride; where
// the stride is 1 the forward kernel with reversed taps is as good (effkernels/native.py uses it).
// The weight gradient is summed by blocks of rows, in double over the blocks, in a fixed order.
#include "common/reduce.h"
#include "common/scratch.h"
#include "common/window.h"
#include "depthwise_conv/depthwise_conv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

template <class T>
void run(const DepthwiseConvArgs& args) {
  const Images& in = args.in;
  const int64_t out_row = args.out_width * in.channels;
  const int64_t weight_stride = round_up(in.channels, kPanel);
  const int64_t tasks = in.count * args.out_height;
  float* sums = nullptr;
  if (args.mean != nullptr) {
    sums = scratch(ScratchUse::kBlock, static_cast<size_t>(tasks * in.channels));
  }
  parallel_for(args.parallel, tasks, [&](int64_t begin, int64_t end) {
    const size_t taps = static_cast<size_t>(args.geometry.kernel_h);
    const T** rows = static_cast<const T**>(__builtin_alloca(taps * sizeof(const T*)));
    for (int64_t task = begin; task < end; task++) {
      float* sum = sums == nullptr ? nullptr : sums + task * in.channels;
      for (int64_t c = 0; sum != nullptr && c < in.channels; c++) sum[c] = 0.0f;
      window_row(static_cast<const T*>(args.input) + task / args.out_height * in.size(), in,
                 args.geometry, task % args.out_height, args.out_width, args.weight, weight_stride,
                 args.epilogue, static_cast<T*>(args.output) + task * out_row, rows, sum);
    }
  });
  if (args.mean == nullptr) return;
  for (int64_t n = 0; n < in.count; n++) {
    reduce_rows(sums + n * args.out_height * in.channels, args.out_height, in.channels,
                1.0f / static_cast<float>(args.out_height * args.out_width),
                static_cast<T*>(args.mean) + n * in.channels);
  }
}

template <class T>
void input_gradient(const DepthwiseConvBackwardArgs& args) {
  const Images& in = args.in;
  const Geometry& g = args.geometry;
  const int64_t channels = in.channels, weight_stride = round_up(channels, kPanel);
  const int64_t out_row = args.out_width * channels, taps = g.kernel_h * g.kernel_w;
  parallel_for(args.parallel, in.count * in.height, [&](int64_t begin, int64_t end) {
    const T** from = static_cast<const T**>(__builtin_alloca(taps * sizeof(const T*)));
    const float** by = static_cast<const float**>(__builtin_alloca(taps * sizeof(const float*)));
    for (int64_t task = begin; task < end; task++) {
      const int64_t y = task % in.height;
      const T* upstream =
          static_cast<const T*>(args.upstream) + task / in.height * args.out_height * out_row;
      T* to = static_cast<T*>(args.input_gradient) + task * in.width * channels;
      for (int64_t x = 0; x < in.width; x++, to += channels) {
        int64_t count = 0;  // of outputs that this pixel went into
        for (int64_t i = 0; i < g.kernel_h; i++) {
          const int64_t oy = y + g.top - i * g.dilation_h;
          if (oy < 0 || oy % g.stride_h != 0 || oy / g.stride_h >= args.out_height) continue;
          for (int64_t j = 0; j < g.kernel_w; j++) {
            const int64_t ox = x + g.left - j * g.dilation_w;
            if (ox < 0 || ox % g.stride_w != 0 || ox / g.stride_w >= args.out_width) continue;
            from[count] = upstream + oy / g.stride_h * out_row + ox / g.stride_w * channels;
            by[count++] = args.weight + (i * g.kernel_w + j) * weight_stride;
          }
        }
        for (int64_t c = 0; c < channels; c += Vec::size) {
          const int64_t n = min_of(channels - c, Vec::size);
          Vec sum = Vec::set1(0.0f);
          if (n == Vec::size) {
            for (int64_t t = 0; t < count; t++) {
              sum = fma(Vec::load(from[t] + c), Vec::load(by[t] + c), sum);
            }
            sum.store(to + c);
          } else {
            for (int64_t t = 0; t < count; t++) {
              sum = fma(load_first(from[t] + c, n), Vec::load(by[t] + c), sum);
            }
            store_first(sum, to + c, n);
          }
        }
      }
    }
  });
}

constexpr int64_t kGradientRows = 4;  // of the output, of one partial sum

// total += the products of one row of outputs and one of inputs, for kTaps neighbouring taps from
// tap j on; [first, last) are the outputs whose pixels exist.
template <int kTaps, class T>
EFFKERNELS_INLINE void weight_row(const DepthwiseConvBackwardArgs& args, const T* upstream,
                                  const T* input, int64_t j, int64_t c, int64_t n, float* total) {
  const Geometry& g = args.geometry;
  const int64_t channels = args.in.channels, step = g.stride_w * channels;
  const auto load = [n](const T* p) EFFKERNELS_LAMBDA_INLINE {
    return n == Vec::size ? Vec::load(p) : load_first(p, n);
  };
  int64_t first = 0, last = args.out_width;  // where all the taps' pixels exist
  while (first < last && first * g.stride_w + j * g.dilation_w < g.left) first++;
  while (last > first &&
         (last - 1) * g.stride_w + (j + kTaps - 1) * g.dilation_w - g.left >= args.in.width) {
    last--;
  }
  Vec sums[kTaps];
  for (int t = 0; t < kTaps; t++) sums[t] = Vec::set1(0.0f);
  const T* p = input + (first * g.stride_w + j * g.dilation_w - g.left) * channels + c;
  for (int64_t x = first; x < last; x++, p += step) {
    const Vec u = load(upstream + x * channels + c);
    for (int t = 0; t < kTaps; t++) {
      sums[t] = fma(u, load(p + t * g.dilation_w * channels), sums[t]);
    }
  }
  const auto edge = [&](int64_t x) EFFKERNELS_LAMBDA_INLINE {
    for (int t = 0; t < kTaps; t++) {
      const int64_t at = x * g.stride_w + (j + t) * g.dilation_w - g.left;
      if (at < 0 || at >= args.in.width) continue;
      sums[t] = fma(load(upstream + x * channels + c), load(input + at * channels + c), sums[t]);
    }
  };
  for (int64_t x = 0; x < first; x++) edge(x);
  for (int64_t x = last; x < args.out_width; x++) edge(x);
  for (int t = 0; t < kTaps; t++) {
    float* to = total + t * channels + c;
    store_first(load_first(to, n) + sums[t], to, n);
  }
}

template <class T>
void weight_gradient(const DepthwiseConvBackwardArgs& args) {
  const Images& in = args.in;
  const Geometry& g = args.geometry;
  const int64_t channels = in.channels, size = g.kernel_h * g.kernel_w * channels;
  const int64_t out_row = args.out_width * channels;
  const int64_t row_blocks = ceil_div(args.out_height, kGradientRows);
  const int64_t blocks = in.count * row_blocks;
  float* partial = scratch(ScratchUse::kBlock, static_cast<size_t>(blocks * size));
  parallel_for(args.parallel, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float* total = partial + b * size;
      for (int64_t i = 0; i < size; i++) total[i] = 0.0f;
      const int64_t image = b / row_blocks, first = b % row_blocks * kGradientRows;
      const T* images = static_cast<const T*>(args.input) + image * in.size();
      const T* upstream = static_cast<const T*>(args.upstream) + image * args.out_height * out_row;
      for (int64_t c = 0; c < channels; c += Vec::size) {
        const int64_t n = min_of(channels - c, Vec::size);
        for (int64_t y = first; y < min_of(args.out_height, first + kGradientRows); y++) {
          const T* row = upstream + y * out_row;
          for (int64_t i = 0; i < g.kernel_h; i++) {
            const int64_t from = y * g.stride_h + i * g.dilation_h - g.top;
            if (from < 0 || from >= in.height) continue;
            const T* pixels = images + from * in.width * channels;
            float* taps = total + i * g.kernel_w * channels;
            int64_t j = 0;
            for (; j + 5 <= g.kernel_w; j += 5) {
              weight_row<5>(args, row, pixels, j, c, n, taps + j * channels);
            }
            for (; j + 3 <= g.kernel_w; j += 3) {
              weight_row<3>(args, row, pixels, j, c, n, taps + j * channels);
            }
            for (; j < g.kernel_w; j++) {
              weight_row<1>(args, row, pixels, j, c, n, taps + j * channels);
            }
          }
        }
      }
    }
  });
  parallel_for(args.parallel, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      double sum = 0.0;
      for (int64_t b = 0; b < blocks; b++) sum += partial[b * size + i];
      args.weight_gradient[i] = static_cast<float>(sum);
    }
  });
}

template <class T>
void run_backward(const DepthwiseConvBackwardArgs& args) {
  if (args.input_gradient != nullptr) input_gradient<T>(args);
  if (args.weight_gradient != nullptr) weight_gradient<T>(args);
}

}  // namespace

void depthwise_conv_backward(const DepthwiseConvBackwardArgs& args) {
  args.dtype == DType::f32 ? run_backward<float>(args) : run_backward<bf16>(args);
}

void depthwise_conv(const DepthwiseConvArgs& args) {
  args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
