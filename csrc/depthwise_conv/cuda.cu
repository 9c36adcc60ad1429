// Depthwise convolution, a kxk window over each channel by itself, and its gradients:
//
//   output[n, y, x, c] = activation(bias[c] + scale[c] * sum over i, j of
//                                   taps[i, j, c] * operand(input)[n, y*s + i - top, x*s + j -
//                                   left, c])
//   input gradient[n, v, u, c] = scale[c] * sum of taps[i, j, c] * t[n, (v + top - i) / s, ..., c]
//   tap gradient[i, j, c]      = sum of t[n, y, x, c] * operand(input)[n, y*s + i - top, ..., c]
//
// (the input gradient over those i and j where the division leaves no rest; t is what an operand
// makes of the upstream gradient). NHWC, taps [k*k, C]. `operand` is a prologue: a BatchNorm's
// affine and an activation, or the gradient of both (effkernels/operands.py); it is zero
// outside the image. Beside the output come sums over pixels for its spatial mean, and moments for
// a BatchNorm. Sums have two stages in a fixed order; there are no atomics.
//
// Moves input and output once (gradients: upstream, z, input and the input's gradient). B0's 5x5
// with 672 channels, 14x14, batch 256, bfloat16: 135 MB, 45 us on an H100 (3.0 TB/s), beside
// 0.84e9 multiply-adds, 29 us at 128 a clock and processor (1.7 GHz): a 5x5 has few instructions to
// waste. Both its gradients: 269 MB, 90 us, and 58 us of multiply-adds; from two kernels 404 MB.
//
// Forward (cuda_forward.h). A block has a strip of columns of an image (7 outputs for each of its
// threads), a few channels, and goes down the rows. Rows come to shared memory by asynchronous
// copies of 16 bytes, two or three ahead, into a ring whose padding was zeroed once, so nothing in
// the loop asks for edges. A thread has two channels, its taps and the sums of the k rows of
// outputs that its window is in, all in registers; it reads, converts and multiplies every value of
// a row once: (7 + k - 1) / 7 times an output. The sums move down a row without a move, as each
// row's first multiply-add reads the registers of the row before. The operand is applied in shared
// memory a row ahead, once an element where a window in registers would do it 1.3 to 1.6 times, and
// by code that all kernels share with the activation known at run time: 18 kernels instead of 54 or
// more. Results go through shared memory, too, and leave as 16-byte stores a step later, so that
// there is one barrier a row. What a thread needs once a row (addresses, masks, sums) waits in
// shared memory, 16 bytes at a time: 5x5 would not fit into 168 registers otherwise.
//
// Gradients (cuda_gradient.h). The input's gradient of stride 1 alone is the forward kernel with
// flipped taps. Both gradients come from one kernel in which a thread has columns of the input: for
// every row of the input it goes over the (k + s - 1) / s rows of t that it meets, which stay in a
// ring in shared memory, and each value of t is loaded and converted once for both: multiplied with
// taps for the one, with inputs for the other. Taps and their sums are 100 registers of a 5x5; the
// window itself slides in registers of at most k columns. A block takes several tiles, and writes
// one partial result a tap.
//
// Counted in the compiler's output (sm_90, bfloat16), instructions a thread and row of 14 outputs,
// so / 14 for one output. 5x5: 402 for the window (350 multiply-adds), 85 for a SiLU, 54 to fetch,
// 45 to store, 37 to round and hand over, 30 for the mean, 45 of the loop: 50 an output (Triton: 50
// to 56). 3x3: 170 for the window, 33 an output (Triton: 33), and no register of either holds a
// row under way. Both gradients: 73 a value (5x5, 50 of them multiply-adds) and 32 (3x3), without
// what fetches and stores; SiLU's gradient 20 a value of t, a forward prologue 11.
//
// Tried and lost, by compiler output:
// - A branch around rows of padding inside the loop: 112 moves a row, and spills. Rows above the
//   image are left out at the start, those below have a loop of their own.
// - The sums' rows keeping their registers, with a variant of the step for each of k - 1 positions:
//   three times the code, and the compiler moved them anyway.
// - The prologue's code for each activation, twice unrolled: half of a kernel's code; now for SiLU,
//   and once for all others. The loops that start a tile written apart: the same fetch twice.
// - 128 registers for a 5x5 of stride 2: spills; it has 168, as stride 1.
// - Four sums instead of 7 columns: 31 instead of 28.7 instructions an output for the window.
// - exp and division with denormal results kept: 12 instead of 6 instructions for a SiLU.
//
// The tiles that the promises' shared memory is of are those of depthwise_conv_config.py.
//
// Not done: small tails (a 5x5 that makes 8 columns has 14), float32 has fewer warps than others,
// 7x7 has no kernel for its weights' gradient but the general one. No GPU has run this.
//
// Warps are those of compute capability 8.0, whose 164 KB are the least of those promised for.
// promise: window_kernel<float, .*> threads 128, shared 115712, warps 4, loads 16, stores 16
// promise: window_kernel<.*, 3, 1> threads 128, shared 49152, warps 12, loads 16, stores 16
// promise: window_kernel<.*, 5, 1> threads 128, shared 53760, warps 12, loads 16, stores 16
// promise: window_kernel<.*> threads 128, shared 62976, warps 8, loads 16, stores 16
// promise: gradient_kernel<float, .*> threads 128, shared 128512, warps 4, loads 16, stores 16
// promise: gradient_kernel<.*> threads 128, shared 74240, warps 8, loads 16, stores 16
// promise: general_kernel<.*> threads 128, shared 2048, warps 32
// promise: general_gradient_kernel<.*> threads 128, shared 512, warps 32
// promise: totals_kernel threads 1024, shared 4096, warps 32
// promise: moments_kernel threads 1024, shared 4096, warps 32
#include "common/cuda.h"
#include "depthwise_conv/cuda.h"
#include "depthwise_conv/cuda_forward.h"
#include "depthwise_conv/cuda_general.h"
#include "depthwise_conv/cuda_gradient.h"
#include "depthwise_conv/cuda_sums.h"

namespace effkernels {
namespace {

void require(bool condition, const char* sentence) {
  if (!condition) throw std::invalid_argument(std::string("depthwise_conv: ") + sentence);
}

// Blocks across, down and over images.
struct Grid {
  int64_t chunks, columns, rows, images;

  int64_t parts() const { return columns * rows * images; }
  int64_t blocks() const { return chunks * parts(); }
};

Grid grid_of(const DepthwiseConvCuda& args) {
  const DepthwiseTile& tile = args.tile;
  const int64_t channels = args.in.channels, rows = ceil_div(args.out_height, tile.rows);
  if (!depthwise_is_tuned(args.geometry, args.between_h, args.between_w)) {
    return {ceil_div(channels, kWarp), 1, rows, args.in.count};
  }
  return {ceil_div(channels, 2 * tile.pairs),
          ceil_div(args.out_width, tile.strips * depthwise_columns(args.geometry.kernel_h)), rows,
          ceil_div(args.in.count, tile.images)};
}

void check_tile(const DepthwiseTile& tile, int pairs_of_vector) {
  require(tile.pairs > 0 && tile.strips > 0 && tile.images > 0 && tile.rows > 0, "an empty tile");
  require(tile.pairs % pairs_of_vector == 0, "a tile's channels are no whole vectors");
  require(tile.pairs * tile.strips * tile.images <= kDepthwiseThreads, "a tile is too large");
}

void check_sizes(const Images& in, int64_t out_height, int64_t out_width, int64_t blocks) {
  const int64_t largest = int64_t{1} << 30;
  require(in.channels * (max_of(in.width, out_width) + 256) < largest &&
              max_of(in.height, out_height) < largest / 4 && in.count < largest,
          "rows of 2^30 values and images 2^28 rows high are not supported");
  require(blocks < int64_t{1} << 31, "more blocks than a launch can have");
}

void check_shared(int64_t shared) {
  require(shared <= device_properties().shared_memory, "the device has too little shared memory");
}

template <class T, int kKernel, int kStride>
void run_window(const DepthwiseConvCuda& args, ForwardArguments a) {
  const DepthwiseTile& tile = args.tile;
  check_tile(tile, kPairs<T>);
  const Grid grid = grid_of(args);
  const int64_t shared = forward_shared<T, kKernel, kStride>(tile, args.operand);
  check_shared(shared);
  a.chunks = static_cast<int>(grid.chunks);
  a.column_blocks = static_cast<int>(grid.columns);
  a.row_blocks = static_cast<int>(grid.rows);
  const int64_t threads = round_up(tile.pairs * tile.strips * tile.images, kWarp);
  launch(window_kernel<T, kKernel, kStride>, dim3(static_cast<unsigned>(grid.blocks())),
         static_cast<int>(threads), shared, args.stream, a);
}

template <class T>
void run_general(const DepthwiseConvCuda& args, const ForwardArguments& a) {
  const Geometry& g = args.geometry;
  const Grid grid = grid_of(args);
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  const GeneralArguments general = {a.output,
                                    a.input,
                                    a.taps,
                                    a.scale,
                                    a.bias,
                                    a.sums,
                                    a.sum_factor,
                                    a.counts,
                                    a.partials,
                                    a.operand,
                                    a.channels,
                                    a.height,
                                    a.width,
                                    a.out_height,
                                    a.out_width,
                                    args.tile.rows,
                                    number(g.kernel_h),
                                    number(g.kernel_w),
                                    number(g.stride_h),
                                    number(g.stride_w),
                                    number(g.dilation_h),
                                    number(g.dilation_w),
                                    number(args.between_h),
                                    number(args.between_w),
                                    a.top,
                                    a.left,
                                    number(grid.chunks),
                                    number(grid.rows),
                                    a.flipped,
                                    a.activation};
  launch(general_kernel<T>, dim3(static_cast<unsigned>(grid.blocks())), kGeneralWarps * kWarp,
         4 * kGeneralWarps * kWarp * 4, args.stream, general);
}

// Calls f(kernel, stride), as constants, of a tuned window.
template <class F>
void with_window(const Geometry& g, F&& f) {
  const auto with_stride = [&](auto kernel) {
    g.stride_h == 1 ? f(kernel, std::integral_constant<int, 1>{})
                    : f(kernel, std::integral_constant<int, 2>{});
  };
  if (g.kernel_h == 3) return with_stride(std::integral_constant<int, 3>{});
  if (g.kernel_h == 5) return with_stride(std::integral_constant<int, 5>{});
  return with_stride(std::integral_constant<int, 7>{});
}

}  // namespace

bool depthwise_is_tuned(const Geometry& g, int64_t between_h, int64_t between_w) {
  return g.kernel_h == g.kernel_w && (g.kernel_h == 3 || g.kernel_h == 5 || g.kernel_h == 7) &&
         g.stride_h == g.stride_w && g.stride_h <= 2 && g.dilation_h == 1 && g.dilation_w == 1 &&
         between_h == 1 && between_w == 1;
}

int64_t depthwise_blocks(const DepthwiseConvCuda& args) {
  const Grid grid = grid_of(args);
  return grid.columns * grid.rows;
}

int64_t depthwise_workspace(const DepthwiseConvCuda& args) {
  return moments_workspace(grid_of(args).parts(), args.in.channels);
}

void depthwise_conv_cuda(const DepthwiseConvCuda& args) {
  require(args.tile.rows > 0, "a tile without rows");
  if (args.in.count == 0 || args.in.channels == 0) return;
  const Grid grid = grid_of(args);
  check_sizes(args.in, args.out_height, args.out_width, grid.blocks());
  const int64_t blocks = grid.columns * grid.rows, channels = args.in.channels;
  require(args.sums != nullptr || args.mean == nullptr || blocks == 1, "a mean without its sums");
  const float pixel = 1.0f / static_cast<float>(args.out_height * args.out_width);
  const bool direct = args.sums == nullptr;  // the only block's sum is all of it
  const bool vectors = is_aligned(args.output) && is_aligned(args.input) &&
                       is_aligned(args.operand.z) &&
                       channels % (args.dtype == DType::f32 ? 4 : 8) == 0;
  const ForwardArguments a = {args.output,
                              args.input,
                              args.taps,
                              args.scale,
                              args.bias,
                              direct ? args.mean : args.sums,
                              direct ? pixel : 1.0f,
                              args.moments ? args.workspace : nullptr,
                              args.moments ? args.workspace + grid.parts() : nullptr,
                              args.operand,
                              args.tile,
                              static_cast<int>(args.in.count),
                              static_cast<int>(channels),
                              static_cast<int>(args.in.height),
                              static_cast<int>(args.in.width),
                              static_cast<int>(args.out_height),
                              static_cast<int>(args.out_width),
                              static_cast<int>(args.geometry.top),
                              static_cast<int>(args.geometry.left),
                              0,
                              0,
                              0,
                              args.flipped,
                              vectors,
                              args.activation};
  with_dtype(args.dtype, [&](auto value) {
    using T = decltype(value);
    if (depthwise_is_tuned(args.geometry, args.between_h, args.between_w)) {
      with_window(args.geometry, [&](auto kernel, auto stride) {
        run_window<T, decltype(kernel)::value, decltype(stride)::value>(args, a);
      });
    } else {
      run_general<T>(args, a);
    }
  });
  if (args.mean != nullptr && !direct) {
    sum_rows(args.mean, args.sums, args.in.count, blocks, channels, pixel, args.stream);
  }
  if (args.moments != nullptr) {
    merge_moments(args.moments, args.workspace, grid.parts(), channels, args.stream);
  }
}

namespace {

template <class T, int kKernel, int kStride>
void run_gradient(const DepthwiseGradientCuda& args, GradientArguments a) {
  const DepthwiseTile& tile = args.tile;
  using M = Meeting<kKernel, kStride>;
  check_tile(tile, kPairs<T>);
  const int64_t shared = gradient_shared<T, kKernel, kStride>(tile, args.gradient);
  check_shared(shared);
  const auto groups = [](int64_t before, int64_t size) {
    return ceil_div(before + size, kStride) - before / kStride;
  };
  const int64_t columns =
      ceil_div(groups(args.geometry.left, args.in.width), tile.strips * M::kColumns);
  const int64_t rows = ceil_div(groups(args.geometry.top, args.in.height), tile.rows);
  const int64_t items = columns * rows * ceil_div(args.in.count, tile.images);
  check_sizes(args.in, args.up_height, args.up_width, items);
  a.chunks = static_cast<int>(ceil_div(args.in.channels, 2 * tile.pairs));
  a.column_blocks = static_cast<int>(columns);
  a.row_blocks = static_cast<int>(rows);
  a.items = static_cast<int>(items);
  const int64_t programs = args.totals ? args.programs : items;
  a.items_each = static_cast<int>(ceil_div(items, programs));
  require((programs - 1) * a.items_each < items, "more programs than have something to do");
  const int64_t threads = round_up(tile.pairs * tile.strips * tile.images, kWarp);
  require(programs * a.chunks < int64_t{1} << 31, "more blocks than a launch can have");
  launch(gradient_kernel<T, kKernel, kStride>, dim3(static_cast<unsigned>(programs * a.chunks)),
         static_cast<int>(threads), shared, args.stream, a);
}

template <class T>
void run_general_gradient(const DepthwiseGradientCuda& args, const GradientArguments& a) {
  const Geometry& g = args.geometry;
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  const int64_t pixels = args.in.count * args.up_height * args.up_width;
  const int64_t chunks = ceil_div(args.in.channels, kWarp);
  const GeneralGradientArguments general = {a.upstream,
                                            a.input,
                                            a.partials,
                                            a.gradient,
                                            a.forward,
                                            pixels,
                                            ceil_div(pixels, args.programs),
                                            a.channels,
                                            a.height,
                                            a.width,
                                            a.up_height,
                                            a.up_width,
                                            number(g.kernel_h),
                                            number(g.kernel_w),
                                            number(g.stride_h),
                                            number(g.stride_w),
                                            number(g.dilation_h),
                                            number(g.dilation_w),
                                            a.top,
                                            a.left,
                                            number(chunks)};
  const int64_t blocks = args.programs * (g.kernel_h * g.kernel_w + 1) * chunks;
  check_sizes(args.in, args.up_height, args.up_width, blocks);
  launch(general_gradient_kernel<T>, dim3(static_cast<unsigned>(blocks)), kGeneralWarps * kWarp,
         kGeneralWarps * kWarp * 4, args.stream, general);
}

}  // namespace

bool depthwise_gradient_is_tuned(const DepthwiseGradientCuda& args) {
  const Geometry& g = args.geometry;
  // Each upstream row and column has to be in reach of the input's first or last groups, where
  // they are taken in for the bias.
  const auto in_reach = [&](int64_t before, int64_t size, int64_t up_size) {
    const int64_t reach = ceil_div(g.kernel_h, g.stride_h);
    return before / g.stride_h < reach && up_size <= ceil_div(before + size, g.stride_h);
  };
  return depthwise_is_tuned(g, 1, 1) && g.kernel_h <= 5 &&
         in_reach(g.top, args.in.height, args.up_height) &&
         in_reach(g.left, args.in.width, args.up_width);
}

void depthwise_gradient_cuda(const DepthwiseGradientCuda& args) {
  require(args.programs > 0, "no programs");
  require(args.totals == nullptr || args.partials != nullptr, "sums without partial sums");
  const Geometry& g = args.geometry;
  const int64_t channels = args.in.channels, rows = g.kernel_h * g.kernel_w + 1;
  if (args.in.count == 0 || channels == 0) {
    require(args.totals == nullptr || channels == 0, "sums over no images");
    return;
  }
  const bool tuned = depthwise_gradient_is_tuned(args);
  require(tuned || args.output == nullptr, "no kernel for the input's gradient");
  const bool vectors = is_aligned(args.output) && is_aligned(args.input) &&
                       is_aligned(args.upstream) && is_aligned(args.gradient.z) &&
                       channels % (args.dtype == DType::f32 ? 4 : 8) == 0;
  const GradientArguments a = {args.output,
                               args.upstream,
                               args.input,
                               args.taps,
                               args.scale,
                               args.totals ? args.partials : nullptr,
                               args.gradient,
                               args.forward,
                               args.tile,
                               static_cast<int>(args.in.count),
                               static_cast<int>(channels),
                               static_cast<int>(args.in.height),
                               static_cast<int>(args.in.width),
                               static_cast<int>(args.up_height),
                               static_cast<int>(args.up_width),
                               static_cast<int>(g.top),
                               static_cast<int>(g.left),
                               0,
                               0,
                               0,
                               0,
                               0,
                               vectors};
  with_dtype(args.dtype, [&](auto value) {
    using T = decltype(value);
    if (!tuned) {
      run_general_gradient<T>(args, a);
    } else if (g.kernel_h == 3) {
      g.stride_h == 1 ? run_gradient<T, 3, 1>(args, a) : run_gradient<T, 3, 2>(args, a);
    } else {
      g.stride_h == 1 ? run_gradient<T, 5, 1>(args, a) : run_gradient<T, 5, 2>(args, a);
    }
  });
  if (args.totals != nullptr) {
    sum_rows(args.totals, args.partials, 1, args.programs, rows * channels, 1.0f, args.stream);
  }
}

}  // namespace effkernels
