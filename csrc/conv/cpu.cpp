// conv: output[n, y, x, k] = epilogue(sum over taps, c of weight[k, tap, c] * input[...])
//
// Layout NHWC: a matrix product (common/gemm.h) whose rows are the windows of the output's pixels,
// written to L2 a chunk at a time: one store per multiply-add and output channel, so 1/32 of the
// work for EfficientNet's stem and less elsewhere.
#include "common/gemm.h"
#include "conv/conv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

// The window of output pixel (y, x): [kernel_h, kernel_w, channels] float32, zero outside.
template <class T>
void copy_window(const T* image, const Images& in, const Geometry& g, int64_t y, int64_t x,
                 float* to) {
  const int64_t tap_row = g.kernel_w * in.channels;
  const int64_t left = x * g.stride_w - g.left;
  const bool inside = g.dilation_w == 1 && left >= 0 && left + g.kernel_w <= in.width;
  for (int64_t ky = 0; ky < g.kernel_h; ky++, to += tap_row) {
    const int64_t row = y * g.stride_h - g.top + ky * g.dilation_h;
    if (row < 0 || row >= in.height) {
      std::memset(to, 0, static_cast<size_t>(tap_row) * sizeof(float));
      continue;
    }
    const T* from = image + row * in.width * in.channels;
    if (inside) {
      convert_row<T>(from + left * in.channels, nullptr, tap_row, to);
      continue;
    }
    for (int64_t kx = 0; kx < g.kernel_w; kx++) {
      const int64_t column = left + kx * g.dilation_w;
      float* tap = to + kx * in.channels;
      if (column < 0 || column >= in.width) {
        std::memset(tap, 0, static_cast<size_t>(in.channels) * sizeof(float));
      } else {
        convert_row<T>(from + column * in.channels, nullptr, in.channels, tap);
      }
    }
  }
}

template <class T>
void run(const ConvArgs& args) {
  const Geometry& g = args.geometry;
  const int64_t depth = g.kernel_h * g.kernel_w * args.in.channels;
  const GemmShape shape{args.in.count, args.out_height * args.out_width, depth, args.out_channels,
                        true};
  gemm(shape, args.weight, args.epilogue, static_cast<T*>(args.output), nullptr, args.parallel,
       [&](int64_t image, int64_t first, int64_t rows, float* buffer) -> const float* {
         const T* from = static_cast<const T*>(args.input) + image * args.in.size();
         int64_t y = first / args.out_width, x = first % args.out_width;
         for (int64_t r = 0; r < rows; r++) {
           copy_window(from, args.in, g, y, x, buffer + r * depth);
           if (++x == args.out_width) {
             x = 0;
             y++;
           }
         }
         return buffer;
       });
}

}  // namespace

void conv(const ConvArgs& args) { args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args); }

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
