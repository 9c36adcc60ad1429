// The tuned forward kernel of cuda.cu, which says what it computes and why it is as it is.
#pragma once

#include "depthwise_conv/cuda_window.h"

namespace effkernels {
namespace {

struct ForwardArguments {
  void* output;
  const void* input;
  const void* taps;
  const float* scale;
  const float* bias;
  float* sums;  // [count, blocks, channels] or null
  float sum_factor;
  float* counts;    // [blocks of all images] or null
  float* partials;  // [blocks of all images, 2, channels]
  DepthwiseOperand operand;
  DepthwiseTile tile;
  int batch, channels, height, width, out_height, out_width, top, left;
  int chunks, column_blocks, row_blocks;  // of an image
  bool flipped;
  bool vectors;  // 16-byte accesses are possible
  Activation activation;
};

// The sums of a thread's outputs, two channels of kColumns columns each, for the rows of the output
// that its window is in, the oldest last. A step moves them down a row without a move: each row's
// first multiply-add reads the registers of the row before and writes its own.
template <int kKernel, int kStride>
struct Sums {
  static constexpr int kColumns = depthwise_columns(kKernel);
  static constexpr int kDepth = (kKernel + kStride - 1) / kStride;
  // Groups of rows in shared memory: one that is multiplied, one that the operand is applied to,
  // and one or, of single rows, two on their way.
  static constexpr int kRing = kStride == 1 ? 4 : 3;
  static constexpr int kInputs = (kColumns - 1) * kStride + kKernel;
  float2 rows[kDepth][kColumns];

  __device__ void clear() {
#pragma unroll
    for (int s = 0; s < kColumns; s++) {
#pragma unroll
      for (int d = 0; d < kDepth; d++) rows[d][s] = {0.0f, 0.0f};
    }
  }

  // What a group of padding adds.
  __device__ void shift() {
#pragma unroll
    for (int s = 0; s < kColumns; s++) {
#pragma unroll
      for (int d = kDepth - 1; d > 0; d--) rows[d][s] = rows[d - 1][s];
      rows[0][s] = {0.0f, 0.0f};
    }
  }

  // Adds row `kPhase` of a group of kStride input rows.
  template <int kPhase, class T>
  __device__ void add(const T* row, int step, const float2 (&taps)[kKernel * kKernel]) {
#pragma unroll
    for (int x = 0; x < kInputs; x++) {
      const float2 input = load2(row + x * step);
#pragma unroll
      for (int s = 0; s < kColumns; s++) {
        const int j = x - s * kStride;
        if (j < 0 || j >= kKernel) continue;
#pragma unroll
        for (int d = kDepth - 1; d >= 0; d--) {
          const int i = kStride * d + kPhase;
          if (i >= kKernel) continue;
          const float2 tap = taps[i * kKernel + j];
          float2& sum = rows[d][s];
          if (kPhase == 0 && j == 0 && d == 0) {
            sum = {tap.x * input.x, tap.y * input.y};
          } else {
            sum = fma_pair(tap, input, kPhase == 0 && j == 0 ? rows[d > 0 ? d - 1 : 0][s] : sum);
          }
        }
      }
    }
  }
};

constexpr int forward_blocks(int size, int kernel) {  // that registers are to allow
  return kernel == 3 ? 4 : kernel == 5 && size == 2 ? 3 : 2;
}

// What a thread keeps in shared memory between its uses, 16 bytes each, beside its registers.
enum Kept { kInput, kOutput, kOthers, kTotals, kKept };

// Bytes of shared memory: rows (twice with z), two rows of outputs, vectors over channels, what
// threads keep.
template <class T, int kKernel, int kStride>
int64_t forward_shared(const DepthwiseTile& tile, const DepthwiseOperand& operand) {
  const int64_t columns = tile.strips * depthwise_columns(kKernel);
  const int64_t rows =
      Sums<kKernel, kStride>::kRing * kStride * ((columns - 1) * kStride + kKernel);
  const int64_t values = (operand.z ? 2 : 1) * rows + 2 * columns;
  const int64_t pairs = tile.images * tile.pairs * (values * 2 * sizeof(T) + kVectors * 8);
  return pairs + kKept * kKeptPitch;
}

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, forward_blocks(sizeof(T), kKernel))
    window_kernel(ForwardArguments a) {
  using Window = Sums<kKernel, kStride>;
  constexpr int kDepth = Window::kDepth, kColumns = Window::kColumns;
  constexpr int kRing = Window::kRing;
  using In = RowPart<T, (Window::kInputs + kPairs<T> - 1) / kPairs<T>>;
  using Out = RowPart<T, (kColumns + kPairs<T> - 1) / kPairs<T>>;
  const DepthwiseTile& tile = a.tile;
  int block = static_cast<int>(blockIdx.x);
  const int first_channel = block % a.chunks * 2 * tile.pairs;
  block /= a.chunks;
  const int part = block;  // of all images
  const int first_x = block % a.column_blocks * tile.strips * kColumns;
  block /= a.column_blocks;
  const int first_y = block % a.row_blocks * tile.rows;
  const int end_y = smaller(first_y + tile.rows, a.out_height);
  const int first_image = block / a.row_blocks * tile.images;
  const Place place(first_channel, first_image, tile, a.batch, a.channels);

  const int columns = (tile.strips * kColumns - 1) * kStride + kKernel;
  const int x = first_x * kStride - a.left;  // the image's column that is the rows' first
  const int step = 2 * tile.pairs;           // values of a pixel
  const int row_values = tile.images * columns * step, group_values = kStride * row_values;
  T* const ring = reinterpret_cast<T*>(dynamic_shared() + kKept * kKeptPitch);
  T* const z_ring = ring + (a.operand.z ? kRing * group_values : 0);
  T* const results = z_ring + kRing * group_values;
  const int result_values = tile.images * tile.strips * kColumns * step;
  float* const vectors = reinterpret_cast<float*>(results + 2 * result_values);
  const int pitch = tile.images * step;  // of vectors
  // How many of the thread's columns are outputs.
  const int valid =
      place.active ? larger(0, smaller(a.out_width - first_x - place.strip * kColumns, kColumns))
                   : 0;
  // Where the thread's columns begin. (All threads multiply; what those find that are not active
  // is nothing to anyone.)
  const int row_start =
      place.slot < tile.images
          ? (place.slot * columns + place.strip * kColumns * kStride) * step + 2 * place.pair
          : 0;
  const int vector_start = place.slot < tile.images ? place.slot * step + 2 * place.pair : 0;
  // The columns to apply the operand to are every strips-th in the image from here on.
  const int apply_from = larger(0, -x) + place.strip;
  const int apply_left = smaller(columns, a.width - x) - apply_from;
  const int apply_count =
      place.active && apply_left > 0 ? (apply_left + tile.strips - 1) / tile.strips : 0;
  {
    const In in(place, tile, columns, x, a.height, a.width, a.batch, a.channels, first_channel);
    const Out out(place, tile, tile.strips * kColumns, first_x, a.out_height, a.out_width, a.batch,
                  a.channels, first_channel);
#pragma unroll 1
    for (int row = 0; row < (a.operand.z ? 2 : 1) * kRing * kStride; row++) {
      in.clear(ring + row * row_values, place, tile, columns, a.vectors);
    }
    store_words(kept(kInput), in.words());
    store_words(kept(kOutput), out.words());
    Words others;
    others.words = {
        static_cast<unsigned>((place.slot * columns + apply_from) * step + 2 * place.pair),
        static_cast<unsigned>(apply_count), static_cast<unsigned>(vector_start),
        static_cast<unsigned>((place.slot * tile.strips + place.strip) * kColumns * step +
                              2 * place.pair)};
    store_words(kept(kOthers), others);
    // The sum of the thread's outputs or, for moments, their mean; then also the squares of the
    // distances to it.
    others.words = {0, 0, 0, 0};
    store_words(kept(kTotals), others);
  }
  const bool has_operand = a.operand.kind != DepthwiseOperand::plain;
  if (place.slot < tile.images && place.strip == 0) {
    float* to = vectors + vector_start;
#pragma unroll 1
    for (int i = 0; i < (has_operand && place.active ? kOperandVectors : 0); i++) {
      store2(to + i * pitch, operand_vector(a.operand, i, place.image, place.channel, a.channels));
    }
    store2(to + kBias * pitch, channel_pair(a.bias, place.channel, a.channels, 0.0f));
  }
  float2 taps[kKernel * kKernel];
  load_taps(taps, static_cast<const T*>(a.taps), a.scale, place.channel, a.channels, a.flipped);

  // Input rows g * kStride - top and, of stride 2, the next are group g. The first groups may be
  // nothing but padding; a group finishes the output row g - (kDepth - 1).
  const int begin = smaller(larger(first_y, a.top / kStride), first_y + kDepth - 1);
  const int end = end_y + kDepth - 1;
  // The first group below the image.
  const int seen = smaller(end, larger(begin, (a.height + a.top + kStride - 1) / kStride));
  const int in_row = a.width * a.channels, out_row = a.out_width * a.channels;
  const auto is_inside = [&](int y) {
    return static_cast<unsigned>(y) < static_cast<unsigned>(a.height);
  };
  const auto slot_of = [](int group) {
    return static_cast<int>(static_cast<unsigned>(group) % kRing);
  };
  const auto fetch = [&](int group) {
    if (group < seen) {
      const In in(load_words(kept(kInput)));
      if (a.vectors) {
#pragma unroll
        for (int phase = 0; phase < kStride; phase++) {
          const int y = group * kStride + phase - a.top;
          const int at = slot_of(group) * group_values + phase * row_values;
          in.fetch(ring + at, a.input, y, in_row, is_inside(y), tile, a.channels);
          if (a.operand.z) {
            in.fetch(z_ring + at, a.operand.z, y, in_row, is_inside(y), tile, a.channels);
          }
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kStride * (a.operand.z ? 2 : 1); i++) {
          const int phase = kStride == 1 ? 0 : i & 1, y = group * kStride + phase - a.top;
          const bool is_z = i >= kStride;
          in.fetch_values(
              (is_z ? z_ring : ring) + slot_of(group) * group_values + phase * row_values,
              is_z ? a.operand.z : a.input, y, in_row, is_inside(y), tile, a.channels,
              first_channel);
        }
      }
    }
    commit_copies();
  };
  const auto store = [&](int y, const T* row) {
    Out(load_words(kept(kOutput)))
        .store(a.output, y, out_row, row, tile, a.channels, first_channel, a.vectors);
  };
  const auto apply = [&](int group) {
    if (group < begin || group >= seen) return;
    const Words words = load_words(kept(kOthers));
    const int start = static_cast<int>(words.word[0]), count = static_cast<int>(words.word[1]);
#pragma unroll 1
    for (int phase = 0; phase < kStride; phase++) {
      if (!is_inside(group * kStride + phase - a.top)) continue;
      const int at = slot_of(group) * group_values + phase * row_values + start;
      apply_operand(a.operand, ring + at, z_ring + at, count, tile.strips * step,
                    vectors + words.word[2], pitch);
    }
  };

  Window sums;
  sums.clear();
  // Bias, activation and the sums over pixels of the row that `group` finishes.
  const auto finish = [&](int group) {
    const int out_y = group - (kDepth - 1);
    float2(&values)[kColumns] = sums.rows[kDepth - 1];
    const Words others = load_words(kept(kOthers));
    const float2 bias = load2(vectors + kBias * pitch + others.word[2]);
    with_activation(a.activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant){}();
#pragma unroll
      for (int s = 0; s < kColumns; s++) {
        values[s] = {activate<kActivation>(values[s].x + bias.x),
                     activate<kActivation>(values[s].y + bias.y)};
      }
    });
    if (valid == 0) return;
    T* to = results + (group & 1 ? result_values : 0) + others.word[3];
#pragma unroll
    for (int s = 0; s < kColumns; s++) store2(to + s * step, values[s]);
    if (a.sums == nullptr && a.counts == nullptr) return;
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < kColumns; s++) {
      if (s < valid) sum = {sum.x + values[s].x, sum.y + values[s].y};
    }
    Words totals = load_words(kept(kTotals));
    float (&total)[4] = totals.value;
    if (a.counts == nullptr) {
      total[0] += sum.x;
      total[1] += sum.y;
    } else {  // row by row, so that nothing is lost to cancellation
      const float count = static_cast<float>(valid), before = count * (out_y - first_y);
      sum = {divide_fast(sum.x, count), divide_fast(sum.y, count)};
      float2 distances = {0.0f, 0.0f};
#pragma unroll
      for (int s = 0; s < kColumns; s++) {
        const float2 distance = {values[s].x - sum.x, values[s].y - sum.y};
        if (s < valid) distances = fma_pair(distance, distance, distances);
      }
      merge_moments_of(before, total[0], total[2], count, sum.x, distances.x);
      merge_moments_of(before, total[1], total[3], count, sum.y, distances.y);
    }
    store_words(kept(kTotals), totals);
  };
  // A step multiplies one group, applies the operand to the next and asks for the one that is
  // kRing - 1 ahead; the first steps only do the latter.
#pragma unroll 1
  for (int group = begin - (kRing - 1); group < seen; group++) {
    // What this step reads is there for all threads; all are done with the step before.
    if (has_operand) {
      wait_copies<kRing - 3>();
    } else {
      wait_copies<kRing - 2>();
    }
    __syncthreads();
    fetch(group + kRing - 1);
    const int out_y = group - (kDepth - 1);
    if (out_y > first_y) store(out_y - 1, results + (group & 1 ? 0 : result_values));
    if (has_operand) apply(group + 1);
    if (group < begin) continue;
    const T* row = ring + slot_of(group) * group_values + row_start;
    sums.template add<0>(row, step, taps);
    if (kStride == 2) sums.template add<kStride - 1>(row + row_values, step, taps);
    if (out_y < first_y) continue;
    finish(group);
  }
  wait_copies<0>();
  // Rows whose windows end in the padding below the image.
#pragma unroll 1
  for (int group = seen; group < end; group++) {
    __syncthreads();
    const int out_y = group - (kDepth - 1);
    if (out_y > first_y) store(out_y - 1, results + (group & 1 ? 0 : result_values));
    sums.shift();
    if (out_y >= first_y) finish(group);
  }
  __syncthreads();
  if (end_y > first_y) store(end_y - 1, results + ((end - 1) & 1 ? result_values : 0));
  if (a.sums == nullptr && a.counts == nullptr) return;

  // A block's strips, and for moments its images, are added in their order.
  const int thread = static_cast<int>(threadIdx.x),
            threads = tile.pairs * tile.strips * tile.images;
  float* const counts = reinterpret_cast<float*>(ring);
  float count = static_cast<float>(valid * (end_y - first_y));
  if (thread < threads) counts[thread] = count;
  __syncthreads();
  const auto total_of = [&](int other) {
    return load_words(kept(kTotals) + (other - thread) * 16);
  };
  if (!place.active || place.strip > 0) return;
  const bool odd = place.channel + 1 == a.channels;  // the pair's second channel does not exist
  if (a.sums != nullptr) {
    float2 sum = {0.0f, 0.0f};
#pragma unroll 1
    for (int s = 0; s < tile.strips; s++) {
      const Words other = total_of(thread + s * tile.pairs);
      const float factor = a.counts != nullptr ? counts[thread + s * tile.pairs] : 1.0f;
      sum = {sum.x + other.value[0] * factor, sum.y + other.value[1] * factor};
    }
    const int blocks = a.column_blocks * a.row_blocks;
    float* to =
        a.sums + (int64_t{place.image} * blocks + part % blocks) * a.channels + place.channel;
    to[0] = sum.x * a.sum_factor;
    if (!odd) to[1] = sum.y * a.sum_factor;
  }
  if (a.counts != nullptr && place.slot == 0) {
    Words totals = total_of(thread);
    float (&total)[4] = totals.value;
#pragma unroll 1
    for (int t = thread + tile.pairs; t < threads; t += tile.pairs) {
      const Words other = total_of(t);
      merge_moments_of(count, total[0], total[2], counts[t], other.value[0], other.value[2]);
      merge_moments_of(count, total[1], total[3], counts[t], other.value[1], other.value[3]);
      count += counts[t];
    }
    float* to = a.partials + int64_t{2} * part * a.channels + place.channel;
    to[0] = total[0] * count;
    to[a.channels] = total[2];
    if (!odd) {
      to[1] = total[1] * count;
      to[a.channels + 1] = total[3];
    }
    if (place.channel == 0) a.counts[part] = count;
  }
}

}  // namespace
}  // namespace effkernels
