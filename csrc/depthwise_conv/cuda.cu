// Depthwise convolution: a kxk window over each channel by itself.
// promise: window_kernel<.*, 3, .> threads 128, shared 49152, warps 20, loads 16, stores 16
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
