// output   = activation((input - mean) * weight / sqrt(var + eps) + bias + residual)
// t        = upstream * activation'(before it)                      (the residual's gradient)
// gradient = factor * t + slope * (input - mean) + constant         (made of sums of t)
//
// Tensors are [rows, channels], rows are pixels: NHWC.
//
//   inference          apply                                      1 launch
//   training           statistics, merge, apply                   3 launches, the input read twice
//   its gradient       sums, merge, differentiate                 3 launches, tensors read twice
//   up to 1024 rows    one block has all rows of its channels: nothing to merge, one launch less
//
// Moves: inference 2 tensors' bytes, training 3, its gradient 5; with a residual 1, 1 and 3 more.
// B0's largest layer at batch 256 (96 channels, 112 x 112, bfloat16: 617 MB a tensor) on an H100 at
// 3.0 TB/s: 0.41, 0.62 and 1.03 ms. The statistics are needed before anything can be written, so
// that the input is read twice unless the L2 (50 MB) still has it.
//
// The idea: a thread has one 16-byte vector of channels in every row it sees (common/cuda_rows.h),
// so that per-channel values are loaded once and sums stay in registers; nothing of the forward
// pass is kept but mean and var. No GPU has run this.
#include "batch_norm_act/cuda.h"
#include "batch_norm_act/cuda_apply.h"
#include "batch_norm_act/cuda_gradient.h"
#include "batch_norm_act/cuda_statistics.h"
#include "common/cuda.h"
#include "common/cuda_rows.h"

namespace effkernels {
namespace {

// ---- Launches

// Blocks that share the rows in a reduction. So few rows that one block goes through them in the
// time of a launch are left to one, of fewer channels: nothing is to be merged then.
struct Shares {
  Tiles tiles;
  int block_rows, blocks;
};

constexpr int kFewRows = 1024;

template <class T>
Shares shares_of(int64_t rows, int64_t channels, int unroll, int resident) {
  if (rows <= kFewRows) return {tiles_of<T>(channels, kThreads, 4), kFewRows, 1};
  const Tiles tiles = tiles_of<T>(channels, kThreads, kWidest);
  const int64_t wanted =
      max_of(1, int64_t{device_properties().processors} * resident / tiles.chunks);
  // Whole steps, and at least two, so that loads are under way while others are worked on.
  const int64_t step = int64_t{unroll} * tiles.lanes;
  const int64_t block_rows = max_of(2, ceil_div(ceil_div(rows, wanted), step)) * step;
  if (block_rows > 1 << 30) throw std::invalid_argument("batch_norm_act: input is too large");
  return {tiles, static_cast<int>(block_rows), static_cast<int>(ceil_div(rows, block_rows))};
}

template <class T>
Shares statistics_shares(int64_t rows, int64_t channels) {
  return shares_of<T>(rows, channels, kUnroll, 3);
}

template <class T>
Shares gradient_shares(int64_t rows, int64_t channels) {
  return shares_of<T>(rows, channels, kUnroll / 2, 2);
}

int64_t table_bytes(const Tiles& tiles, int vector, int rows) {
  return int64_t{4} * rows * tiles.width * vector;
}

// Steps of a block in an elementwise pass: more of them load the vectors of the channels less
// often, as long as every processor has some 16 blocks.
int64_t steps_of(int64_t rows, const Tiles& tiles, int unroll) {
  const int64_t steps = ceil_div(rows, int64_t{unroll} * tiles.lanes) * tiles.chunks;
  return max_of(1, min_of(8, steps / (16 * int64_t{device_properties().processors})));
}

Normalization of(const NormalizationCuda& n) {
  return {n.mean, n.var, n.weight, n.bias, static_cast<float>(n.eps)};
}

unsigned blocks_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::invalid_argument("batch_norm_act: input is too large");
  return static_cast<unsigned>(blocks);
}

template <class T>
bool all_aligned(int64_t channels, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer)) return false;
  }
  return channels % kVector<T> == 0;
}

template <class T>
void run_statistics(const BatchNormActCuda& args) {
  const Shares shares = statistics_shares<T>(args.rows, args.channels);
  const Tiles& tiles = shares.tiles;
  const Statistics<T> statistics = {static_cast<const T*>(args.input),
                                    args.scratch,
                                    args.mean,
                                    args.var,
                                    args.rows,
                                    shares.block_rows,
                                    shares.blocks,
                                    tiles,
                                    all_aligned<T>(args.channels, {args.input})};
  launch(statistics_kernel<T>, dim3(blocks_of(int64_t{shares.blocks} * tiles.chunks)), kThreads,
         table_bytes(tiles, kVector<T>, 3 * tiles.lanes + 1), args.stream, statistics);
  if (shares.blocks == 1) return;
  const Merge merge = {args.scratch,
                       args.mean,
                       args.var,
                       args.rows,
                       shares.block_rows,
                       shares.blocks,
                       static_cast<int>(args.channels)};
  launch(merge_statistics_kernel, dim3(blocks_of(ceil_div(args.channels, kMergeChannels))),
         kMergeChannels * kMergeLanes, 4 * kMergeChannels * kMergeLanes, args.stream, merge);
}

template <class T, bool kResidual>
void run_apply(const BatchNormActCuda& args) {
  constexpr int kRows = kResidual ? kUnroll / 2 : kUnroll;
  const Tiles tiles = tiles_of<T>(args.channels, kThreads, kWidest);
  const int64_t steps = steps_of(args.rows, tiles, kRows);
  const int64_t blocks = ceil_div(args.rows, steps * kRows * tiles.lanes) * tiles.chunks;
  const Apply<T> apply = {static_cast<T*>(args.output),
                          static_cast<const T*>(args.input),
                          static_cast<const T*>(args.residual),
                          of(args.normalization),
                          args.rows,
                          static_cast<int>(steps),
                          tiles,
                          all_aligned<T>(args.channels, {args.output, args.input, args.residual}),
                          args.activation};
  launch(apply_kernel<T, kResidual>, dim3(blocks_of(blocks)), kThreads,
         table_bytes(tiles, kVector<T>, kNormalization), args.stream, apply);
}

template <class T>
void run_backward(const BatchNormActBackwardCuda& args) {
  // A tensor that no derivative depends on is not read; its pointer is one, nevertheless.
  const bool reads_residual = args.residual && args.activation != Activation::none;
  const void* residual = reads_residual ? args.residual : args.upstream;
  const bool outputs = args.input_gradient || args.residual_gradient;
  const bool slopes = args.training && args.input_gradient;
  const Shares shares = gradient_shares<T>(args.rows, args.channels);
  const int64_t partials = shares.blocks == 1 ? 0 : int64_t{2} * shares.blocks * args.channels;
  const Normalization normalization = of(args.normalization);
  const Finish finish = {args.scratch,
                         normalization,
                         args.weight_gradient,
                         args.bias_gradient,
                         args.mean_gradient,
                         args.var_gradient,
                         args.mean_upstream,
                         args.var_upstream,
                         slopes ? args.scratch + partials : nullptr,
                         static_cast<float>(args.rows),
                         shares.blocks,
                         static_cast<int>(args.channels),
                         args.training};
  const bool sums = slopes || args.weight_gradient.data || args.bias_gradient.data ||
                    args.mean_gradient.data || args.var_gradient.data;
  if (sums) {
    const Sums<T> problem = {static_cast<const T*>(args.upstream),
                             static_cast<const T*>(args.input),
                             static_cast<const T*>(residual),
                             finish,
                             args.scratch,
                             args.rows,
                             shares.block_rows,
                             shares.tiles,
                             all_aligned<T>(args.channels, {args.upstream, args.input, residual}),
                             reads_residual,
                             args.activation};
    launch(gradient_sums_kernel<T>, dim3(blocks_of(int64_t{shares.blocks} * shares.tiles.chunks)),
           kThreads,
           table_bytes(shares.tiles, kVector<T>,
                       static_cast<int>(max_of(kNormalization, 2 * shares.tiles.lanes))),
           args.stream, problem);
    if (shares.blocks > 1) {
      launch(merge_gradient_sums_kernel<T>,
             dim3(blocks_of(ceil_div(args.channels, kMergeChannels))), kMergeChannels * kMergeLanes,
             4 * kMergeChannels * kMergeLanes, args.stream, finish);
    }
  }
  if (!outputs) return;
  const Tiles tiles = tiles_of<T>(args.channels, kThreads, kWidest);
  const int64_t steps = steps_of(args.rows, tiles, kUnroll / 2);
  const int64_t blocks = ceil_div(args.rows, steps * (kUnroll / 2) * tiles.lanes) * tiles.chunks;
  const bool reads_input = slopes || args.activation != Activation::none;
  const Differentiate<T> problem = {
      static_cast<T*>(args.input_gradient),
      static_cast<T*>(args.residual_gradient),
      static_cast<const T*>(args.upstream),
      static_cast<const T*>(args.input),
      static_cast<const T*>(residual),
      finish.slope,
      normalization,
      args.rows,
      static_cast<int>(steps),
      tiles,
      all_aligned<T>(args.channels, {args.input_gradient, args.residual_gradient, args.upstream,
                                     args.input, residual}),
      reads_input,
      reads_residual,
      args.activation};
  launch(differentiate_kernel<T>, dim3(blocks_of(blocks)), kThreads,
         table_bytes(tiles, kVector<T>, kGradient), args.stream, problem);
}

}  // namespace

int64_t batch_norm_act_scratch(DType dtype, int64_t rows, int64_t channels) {
  int64_t blocks = 0;
  with_dtype(dtype, [&](auto value) {
    blocks = statistics_shares<decltype(value)>(rows, channels).blocks;
  });
  return blocks == 1 ? 0 : 2 * blocks * channels;
}

int64_t batch_norm_act_backward_scratch(DType dtype, int64_t rows, int64_t channels) {
  int64_t blocks = 0;
  with_dtype(dtype,
             [&](auto value) { blocks = gradient_shares<decltype(value)>(rows, channels).blocks; });
  return (blocks == 1 ? 2 : 2 * blocks + 2) * channels;
}

void batch_norm_act_cuda(const BatchNormActCuda& args, bool training) {
  if (args.rows == 0 || args.channels == 0) return;
  with_dtype(args.dtype, [&](auto value) {
    using T = decltype(value);
    if (training) run_statistics<T>(args);
    args.residual ? run_apply<T, true>(args) : run_apply<T, false>(args);
  });
}

void batch_norm_act_backward_cuda(const BatchNormActBackwardCuda& args) {
  if (args.rows == 0 || args.channels == 0) return;
  with_dtype(args.dtype, [&](auto value) { run_backward<decltype(value)>(args); });
}

}  // namespace effkernels
