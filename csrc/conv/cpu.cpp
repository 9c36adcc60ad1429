// conv: output[n, y, x, k] = epilogue(sum over taps, c of weight[k, tap, c] * input[...])
//
// Layout NHWC, or NCHW for the input: a network's first convolution reads images as they come.
// A matrix product (common/gemm.h) whose rows are the windows of the output's pixels. Bytes: input
// and output once, weights once per band; operations: taps * C * K multiply-adds a pixel.
//
// A thread copies the input rows of a band of output rows to its L2, with their padding and as
// float32, and the product reads the windows there: rows of A are a pixel's step apart, and a table
// says where their values lie. Output rows shorter than a register tile would use each weight too
// seldom; there the windows are written out (im2col) and make one matrix of all pixels.
// Windows of 3x3 at stride 1 are computed otherwise where that is faster, see winograd.h.
//
// Ladder, EfficientNet-B0's stem (3 -> 32 channels, 112x112 outputs), one Zen 5 core, avx512:
//   NCHW -> NHWC by PyTorch, windows written out                                        0.30 ms
//   a band in NCHW, read through the table                                              0.15 ms
#include "conv/winograd.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

template <class T>
void run_windows(const ConvArgs& args) {
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

// Input rows with their padding, for some output rows: [planes][height][line], where NHWC is one
// plane with lines of width * channels and NCHW has a plane per channel.
struct Band {
  int64_t planes, height, width, values;  // values of a pixel within a plane
  int64_t line() const { return width * values; }
  int64_t plane() const { return height * line(); }
};

template <class T>
void copy_band(const T* image, const Images& in, const Geometry& g, const Band& band, int64_t top,
               float* to) {
  const int64_t values = band.values;
  const int64_t begin = min_of(g.left, band.width);  // columns [begin, end) lie in the image
  const int64_t end = max_of(begin, min_of(band.width, g.left + in.width));
  const auto zero = [](float* from, float* until) {
    if (until > from) std::memset(from, 0, static_cast<size_t>(until - from) * sizeof(float));
  };
  for (int64_t plane = 0; plane < band.planes; plane++) {
    for (int64_t row = 0; row < band.height; row++, to += band.line()) {
      const int64_t y = top + row;
      if (y < 0 || y >= in.height || begin == end) {
        zero(to, to + band.line());
        continue;
      }
      const T* from = image + (plane * in.height + y) * in.width * values;
      zero(to, to + begin * values);
      convert_row(from, nullptr, (end - begin) * values, to + begin * values);
      zero(to + end * values, to + band.line());
    }
  }
}

template <class T>
void run_bands(const ConvArgs& args) {
  const Geometry& g = args.geometry;
  const Images& in = args.in;
  const int64_t depth = g.kernel_h * g.kernel_w * in.channels, channels = args.out_channels;
  if (in.count * args.out_height * args.out_width * channels == 0) return;
  Band band{};
  band.planes = args.planar ? in.channels : 1;
  band.values = args.planar ? 1 : in.channels;
  band.width = (args.out_width - 1) * g.stride_w + g.dilation_w * (g.kernel_w - 1) + 1;
  band.height = (args.out_height - 1) * g.stride_h + g.dilation_h * (g.kernel_h - 1) + 1;
  const bool in_place = std::is_same_v<T, float> && g.left == 0 && g.top == 0 &&
                        band.width <= in.width && band.height <= in.height;
  // The new rows of a band fill half of an L2 of 512 KB at most.
  const int64_t row = band.planes * band.line() * g.stride_h;
  const int64_t most = max_of(1, min_of(args.out_height, 65536 / max_of(row, 1)));
  int64_t bands = ceil_div(args.out_height, most);
  bands = min_of(args.out_height, round_up(in.count * bands, args.parallel.threads) / in.count);
  const int64_t rows = ceil_div(args.out_height, bands);
  bands = ceil_div(args.out_height, rows);
  if (in_place) {  // no padding: the image is its own band
    band.width = in.width;
    band.height = in.height;
  } else {
    band.height = (rows - 1) * g.stride_h + g.dilation_h * (g.kernel_h - 1) + 1;
  }

  int32_t* offsets = reinterpret_cast<int32_t*>(
      scratch(ScratchUse::kBlock, static_cast<size_t>(depth)));  // as wide as a float
  for (int64_t ky = 0, i = 0; ky < g.kernel_h; ky++) {
    for (int64_t kx = 0; kx < g.kernel_w; kx++) {
      const int64_t tap = ky * g.dilation_h * band.line() + kx * g.dilation_w * band.values;
      for (int64_t c = 0; c < in.channels; c++, i++) {
        offsets[i] = static_cast<int32_t>(tap + (args.planar ? c * band.plane() : c));
      }
    }
  }

  const T* residual = static_cast<const T*>(args.epilogue.residual);
  const int64_t panels = ceil_div(channels, kPanel);
  parallel_for(args.parallel, in.count * bands, [&](int64_t begin, int64_t end) {
    float* buffer =
        scratch(ScratchUse::kPanelRows, static_cast<size_t>(band.planes * band.plane()));
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / bands, first = task % bands * rows;
      const int64_t last = min_of(args.out_height, first + rows);
      const T* source = static_cast<const T*>(args.input) + image * in.size();
      const float* windows = buffer;
      if constexpr (std::is_same_v<T, float>) {
        if (in_place) windows = source + first * g.stride_h * band.line();
      }
      if (!in_place) copy_band(source, in, g, band, first * g.stride_h - g.top, buffer);
      for (int64_t k = 0; k < channels; k += kTileChannels) {
        const int64_t count = min_of(channels - k, kTileChannels);
        const int64_t here = ceil_div(count, kPanel);
        const int64_t after = min_of(k / kPanel + here, panels - here);
        for (int64_t y = first; y < last; y++) {
          const int64_t start = (image * args.out_height + y) * args.out_width * channels + k;
          gemm_rows(windows + (y - first) * g.stride_h * band.line(), g.stride_w * band.values,
                    Table{offsets}, args.out_width, args.weight + k * depth, count, depth,
                    args.weight + (y + 1 == last ? after * kPanel : k) * depth,
                    [&](int64_t x, int64_t done, const float* tile) {
                      const int64_t at = start + x * channels;
                      finish_rows<T>(tile, kTileChannels, done, count, args.epilogue, k,
                                     residual == nullptr ? nullptr : residual + at,
                                     static_cast<T*>(args.output) + at, channels, nullptr);
                    });
        }
      }
    }
  });
}

constexpr int64_t kShortest = 14;  // outputs of a row that is worth a product of its own

template <class T>
void run(const ConvArgs& args) {
  if (args.transformed != nullptr) {
    args.tile_width == 2 ? Winograd<T, 2>(args).run() : Winograd<T, 4>(args).run();
  } else if (args.planar || args.out_width >= kShortest) {
    run_bands<T>(args);
  } else {
    run_windows<T>(args);
  }
}

}  // namespace

void conv(const ConvArgs& args) { args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args); }

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
