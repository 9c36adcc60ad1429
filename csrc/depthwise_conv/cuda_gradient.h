// The tuned gradient kernel of cuda.cu: the gradients for the input and for the taps, from one pass
// over the upstream gradient.
#pragma once

#include "depthwise_conv/cuda_window.h"

namespace effkernels {
namespace {

struct GradientArguments {
  void* output;  // the gradient for the input, or null
  const void* upstream;
  const void* input;
  const void* taps;
  const float* scale;
  float* partials;  // [programs, taps + 1, channels] or null: the last is the bias's
  DepthwiseOperand gradient, forward;
  DepthwiseTile tile;
  int batch, channels, height, width, up_height, up_width, top, left;
  int chunks, column_blocks, row_blocks, items, items_each;
  bool vectors;  // 16-byte accesses are possible
};

// In coordinates that count the padding, too, row kStride * a + phase of the input meets row a - e
// of the upstream gradient at tap phase + kStride * e; the same of columns. A step is one a, a
// thread has kColumns such groups of kStride columns.
template <int kKernel, int kStride>
struct Meeting {
  static constexpr int kColumns = depthwise_gradient_columns(kStride);
  static constexpr int kReach = (kKernel + kStride - 1) / kStride;
  static constexpr int kUpstream = kColumns + kReach - 1;  // columns of the upstream gradient
};

// What a thread keeps in shared memory; kOwn: the sums for the bias, and where its columns begin.
enum GradientKept { kUp, kIn, kApply, kOwnColumns, kOwn, kGradientKept };

constexpr int kUpstreamAhead = 2, kInputRing = kUpstreamAhead + 1;

// Bytes of shared memory: rows of the upstream gradient, of z, of the input and of the result,
// vectors over channels of both operands, what threads keep. At the end: all sums.
template <class T, int kKernel, int kStride>
int64_t gradient_shared(const DepthwiseTile& tile, const DepthwiseOperand& gradient) {
  using M = Meeting<kKernel, kStride>;
  const int64_t upstream = tile.strips * M::kColumns + M::kReach - 1;
  const int64_t input = tile.strips * M::kColumns * kStride;
  const int64_t rows = M::kReach + kUpstreamAhead + (gradient.z ? kUpstreamAhead : 0);
  const int64_t values = rows * upstream + (kInputRing + 2) * kStride * input;
  const int64_t pairs = tile.images * tile.pairs * (values * 2 * sizeof(T) + 2 * kVectors * 8);
  const int64_t threads = round_up(tile.images * tile.pairs * tile.strips, kWarp);
  return max_of(pairs + kGradientKept * kKeptPitch, (kKernel * kKernel + 1) * 8 * threads);
}

constexpr int gradient_blocks(int size, int kernel, int stride) {  // that registers are to allow
  if (size == 4) return kernel == 3 ? 5 - stride : 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (kernel == 5) return 2;  // shared memory has no room for a third
#endif
  return kernel == 3 ? 4 : 3;
}

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, gradient_blocks(sizeof(T), kKernel, kStride))
    gradient_kernel(GradientArguments a) {
  using M = Meeting<kKernel, kStride>;
  constexpr int kColumns = M::kColumns, kReach = M::kReach, kTaps = kKernel * kKernel;
  constexpr int kRing = kReach + kUpstreamAhead;
  using Up = RowPart<T, (M::kUpstream + kPairs<T> - 1) / kPairs<T>>;
  using In = RowPart<T, (kColumns * kStride + kPairs<T> - 1) / kPairs<T>>;
  const DepthwiseTile& tile = a.tile;
  const int first_channel = static_cast<int>(blockIdx.x) % a.chunks * 2 * tile.pairs;
  int number = static_cast<int>(blockIdx.x) / a.chunks * a.items_each;  // of the item

  const int up_columns = tile.strips * kColumns + kReach - 1;
  const int in_columns = tile.strips * kColumns * kStride;
  const int step = 2 * tile.pairs;  // values of a pixel
  const int up_values = tile.images * up_columns * step;
  const int in_values = tile.images * in_columns * step;
  T* const ring = reinterpret_cast<T*>(dynamic_shared() + kGradientKept * kKeptPitch);
  T* const z_ring = ring + kRing * up_values;
  T* const in_ring = z_ring + (a.gradient.z ? kUpstreamAhead : 0) * up_values;
  T* const results = in_ring + kInputRing * kStride * in_values;
  float* const vectors = reinterpret_cast<float*>(results + 2 * kStride * in_values);
  const int pitch = tile.images * step;  // of vectors
  float2 taps[kTaps], sums[kTaps];
  {
    const int channel = first_channel + 2 * (static_cast<int>(threadIdx.x) % tile.pairs);
    load_taps(taps, static_cast<const T*>(a.taps), a.scale, channel, a.channels, false);
#pragma unroll
    for (int i = 0; i < kTaps; i++) sums[i] = {0.0f, 0.0f};
    Words zero;
    zero.words = {0, 0, 0, 0};
    store_words(kept(kOwn), zero);
  }
  const bool has_gradient = a.gradient.kind != DepthwiseOperand::plain;
  const bool has_forward = a.forward.kind != DepthwiseOperand::plain && a.partials != nullptr;
  const int a_first = a.top / kStride, b_first = a.left / kStride;
  const int a_end = (a.top + a.height + kStride - 1) / kStride;

#pragma unroll 1
  while (true) {
    int item = number;
    const int column_block = item % a.column_blocks;
    item /= a.column_blocks;
    const int row_block = item % a.row_blocks;
    const int first_image = item / a.row_blocks * tile.images;
    const int first_b = b_first + column_block * tile.strips * kColumns;
    const int begin = a_first + row_block * tile.rows;
    const int end = smaller(begin + tile.rows, a_end);
    const int first_up = first_b - (kReach - 1);     // column of the upstream gradient
    const int first_x = first_b * kStride - a.left;  // and of the input
    {
      __syncthreads();  // the item before is done with
      const Place place(first_channel, first_image, tile, a.batch, a.channels);
      const Up up(place, tile, up_columns, first_up, a.up_height, a.up_width, a.batch, a.channels,
                  first_channel);
      const In in(place, tile, in_columns, first_x, a.height, a.width, a.batch, a.channels,
                  first_channel);
#pragma unroll 1
      for (int row = 0; row < kRing + (a.gradient.z ? kUpstreamAhead : 0); row++) {
        up.clear(ring + row * up_values, place, tile, up_columns, a.vectors);
      }
#pragma unroll 1
      for (int row = 0; row < kInputRing * kStride; row++) {
        in.clear(in_ring + row * in_values, place, tile, in_columns,
                 a.vectors && a.partials != nullptr);
      }
      store_words(kept(kUp), up.words());
      store_words(kept(kIn), in.words());
      const bool there = place.slot < tile.images;
      const int vector_start = there ? place.slot * step + 2 * place.pair : 0;
      const int up_slot = place.slot * up_columns * step + 2 * place.pair;
      const int in_slot = place.slot * in_columns * step + 2 * place.pair;
      // The columns that the thread applies the operands to, and those it adds up for the bias, are
      // every strips-th from one on. For the bias a block has the columns from its first group on,
      // and what no other block has; the same of rows.
      const auto count = [&](int from, int to) {
        return static_cast<unsigned>(
            place.active && to > from ? (to - from + tile.strips - 1) / tile.strips : 0);
      };
      const int up_from = larger(0, -first_up) + place.strip;
      const int up_to = smaller(up_columns, a.up_width - first_up);
      const int bias_from = column_block == 0 ? up_from : kReach - 1 + place.strip;
      const int in_from = larger(0, -first_x) + place.strip;
      Words words;
      words.words = {static_cast<unsigned>(up_slot + up_from * step), count(up_from, up_to),
                     static_cast<unsigned>(in_slot + in_from * step),
                     count(in_from, smaller(in_columns, a.width - first_x))};
      store_words(kept(kApply), words);
      words.words = {static_cast<unsigned>(up_slot + bias_from * step), count(bias_from, up_to),
                     static_cast<unsigned>(vector_start),
                     static_cast<unsigned>(row_block == 0 ? 0 : begin)};
      store_words(kept(kOwnColumns), words);
      // Where the thread's columns begin.
      words = load_words(kept(kOwn));
      words.word[2] = there ? up_slot + place.strip * kColumns * step : 0;
      words.word[3] = there ? in_slot + place.strip * kColumns * kStride * step : ~0u;  // no place
      store_words(kept(kOwn), words);
      if (there && place.strip == 0) {
#pragma unroll 1
        for (int i = 0; i < (place.active ? kOperandVectors : 0); i++) {
          store2(vectors + vector_start + i * pitch,
                 operand_vector(a.gradient, i, place.image, place.channel, a.channels));
          store2(vectors + vector_start + (kVectors + i) * pitch,
                 operand_vector(a.forward, i, place.image, place.channel, a.channels));
        }
      }
    }

    const int up_row = a.up_width * a.channels, in_row = a.width * a.channels;
    const auto in_slot_of = [](int group) {
      return static_cast<int>(static_cast<unsigned>(group + kInputRing * kReach) % kInputRing);
    };
    const auto fetch = [&](int group, int slot) {
      if (group < end) {
        const Up up(load_words(kept(kUp)));
        const In in(load_words(kept(kIn)));
        const bool real = static_cast<unsigned>(group) < static_cast<unsigned>(a.up_height);
        T* const to = ring + slot * up_values;
        T* const z_to = z_ring + (group & 1) * up_values;
        T* const in_to = in_ring + in_slot_of(group) * kStride * in_values;
        const auto is_inside = [&](int y) {
          return group >= begin && static_cast<unsigned>(y) < static_cast<unsigned>(a.height);
        };
        if (a.vectors) {
          up.fetch(to, a.upstream, group, up_row, real, tile, a.channels);
          if (a.gradient.z) up.fetch(z_to, a.gradient.z, group, up_row, real, tile, a.channels);
          if (a.partials) {
#pragma unroll
            for (int phase = 0; phase < kStride; phase++) {
              const int y = group * kStride + phase - a.top;
              in.fetch(in_to + phase * in_values, a.input, y, in_row, is_inside(y), tile,
                       a.channels);
            }
          }
        } else {
#pragma unroll 1
          for (int i = 0; i < (a.gradient.z ? 2 : 1); i++) {
            up.fetch_values(i == 0 ? to : z_to, i == 0 ? a.upstream : a.gradient.z, group, up_row,
                            real, tile, a.channels, first_channel);
          }
#pragma unroll 1
          for (int phase = 0; phase < (a.partials ? kStride : 0); phase++) {
            const int y = group * kStride + phase - a.top;
            in.fetch_values(in_to + phase * in_values, a.input, y, in_row, is_inside(y), tile,
                            a.channels, first_channel);
          }
        }
      }
      commit_copies();
    };
    // What the convolution sees of a group's rows, in their place; and the sums for the bias.
    const auto apply = [&](int group, int slot) {
      const Words words = load_words(kept(kApply)), for_bias = load_words(kept(kOwnColumns));
      const float* pair_vectors = vectors + for_bias.word[2];
      const int each = tile.strips * step;
      if (static_cast<unsigned>(group) < static_cast<unsigned>(a.up_height)) {
        T* row = ring + slot * up_values;
        if (has_gradient) {
          apply_operand(a.gradient, row + words.word[0],
                        z_ring + (group & 1) * up_values + words.word[0],
                        static_cast<int>(words.word[1]), each, pair_vectors, pitch);
        }
        if (a.partials && group >= static_cast<int>(for_bias.word[3])) {
          Words own = load_words(kept(kOwn));
          row += for_bias.word[0];
          float2 total = {0.0f, 0.0f};
#pragma unroll 1
          for (unsigned i = 0; i < for_bias.word[1]; i++, row += each) {
            const float2 value = load2(row);
            total = {total.x + value.x, total.y + value.y};
          }
          own.value[0] += total.x;
          own.value[1] += total.y;
          store_words(kept(kOwn), own);
        }
      }
      if (!has_forward || group < begin) return;
#pragma unroll 1
      for (int phase = 0; phase < kStride; phase++) {
        const int y = group * kStride + phase - a.top;
        if (static_cast<unsigned>(y) >= static_cast<unsigned>(a.height)) continue;
        T* row = in_ring + (in_slot_of(group) * kStride + phase) * in_values + words.word[2];
        apply_operand(a.forward, row, row, static_cast<int>(words.word[3]), each,
                      pair_vectors + kVectors * pitch, pitch);
      }
    };
    const auto store = [&](int group) {
      const In in(load_words(kept(kIn)));
#pragma unroll 1
      for (int phase = 0; phase < kStride; phase++) {
        const int y = group * kStride + phase - a.top;
        if (static_cast<unsigned>(y) >= static_cast<unsigned>(a.height)) continue;
        in.store(a.output, y, in_row, results + ((group & 1) * kStride + phase) * in_values, tile,
                 a.channels, first_channel, a.vectors);
      }
    };

    // Group g of the upstream gradient lies in slot (g - start) % kRing. A step multiplies one
    // group, applies the operands to the next and asks for the one after.
    const int start = begin - (kReach - 1);
    int slot = kRing - kUpstreamAhead;  // of group start - kUpstreamAhead
#pragma unroll 1
    for (int group = start - kUpstreamAhead; group < end; group++) {
      wait_copies<0>();
      __syncthreads();
      // (In flight while this step works: what it asks for now.)
      const int next = slot + 1 >= kRing ? slot + 1 - kRing : slot + 1;
      const int after = next + 1 >= kRing ? 0 : next + 1;
      fetch(group + kUpstreamAhead, after);
      if (a.output != nullptr && group > begin) store(group - 1);
      if (group + 1 >= start && group + 1 < end) apply(group + 1, next);
      const Words own = load_words(kept(kOwn));
      if (group >= begin && static_cast<int>(own.word[3]) >= 0) {
        const int up_start = static_cast<int>(own.word[2]),
                  in_start = static_cast<int>(own.word[3]);
#pragma unroll
        for (int phase = 0; phase < kStride; phase++) {
          const T* row = ring + up_start;
          const T* in_at = in_ring + in_start + (in_slot_of(group) * kStride + phase) * in_values;
          // (Asked for again: a register less.)
          T* to = results + in_start + ((group & 1) * kStride + phase) * in_values;
          const T* rows[kReach];
#pragma unroll
          for (int e = 0; e < kReach; e++) {
            rows[e] = row + (slot - e < 0 ? slot - e + kRing : slot - e) * up_values;
          }
          float2 inputs[kColumns * kStride], results_of[kColumns * kStride];
#pragma unroll
          for (int m = 0; m < M::kUpstream; m++) {
            if (m < kColumns) {
#pragma unroll
              for (int c = 0; c < kStride; c++) {
                inputs[m * kStride + c] = load2(in_at + (m * kStride + c) * step);
                results_of[m * kStride + c] = {0.0f, 0.0f};
              }
            }
#pragma unroll
            for (int e = 0; e < kReach; e++) {
              const int i = phase + kStride * e;
              if (i >= kKernel) continue;
              const float2 t = load2(rows[e] + m * step);
#pragma unroll
              for (int f = 0; f < kReach; f++) {
                const int q = m - (kReach - 1) + f;
                if (q < 0 || q >= kColumns) continue;
#pragma unroll
                for (int c = 0; c < kStride; c++) {
                  const int j = c + kStride * f, n = q * kStride + c;
                  if (j >= kKernel) continue;
                  const int tap = i * kKernel + j;
                  results_of[n] = fma_pair(taps[tap], t, results_of[n]);
                  sums[tap] = fma_pair(inputs[n], t, sums[tap]);
                }
              }
            }
            const int done = m - (kReach - 1);
            if (done >= 0) {
#pragma unroll
              for (int c = 0; c < kStride; c++) {
                store2(to + (done * kStride + c) * step, results_of[done * kStride + c]);
              }
            }
          }
        }
      }
      slot = next;
    }
    __syncthreads();
    if (a.output != nullptr && end > begin) store(end - 1);
    number++;
    if (number == a.items || number % a.items_each == 0) break;
  }

  if (a.partials == nullptr) return;
  // The block's strips and images are added in their order.
  const float2 bias = load2(load_words(kept(kOwn)).value);
  __syncthreads();
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x), each = tile.strips * tile.images;
  float* const all = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kTaps; i++) store2(all + 2 * (i * threads + thread), sums[i]);
  store2(all + 2 * (kTaps * threads + thread), bias);
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < (kTaps + 1) * tile.pairs; i += threads) {
    const int tap = i / tile.pairs, pair = i % tile.pairs, channel = first_channel + 2 * pair;
    float2 total = {0.0f, 0.0f};
#pragma unroll 1
    for (int s = 0; s < each; s++) {
      const float2 other = load2(all + 2 * (tap * threads + s * tile.pairs + pair));
      total = {total.x + other.x, total.y + other.y};
    }
    float* to = a.partials +
                (int64_t{(number - 1) / a.items_each} * (kTaps + 1) + tap) * a.channels + channel;
    if (channel < a.channels) to[0] = total.x;
    if (channel + 1 < a.channels) to[1] = total.y;
  }
}

}  // namespace
}  // namespace effkernels
