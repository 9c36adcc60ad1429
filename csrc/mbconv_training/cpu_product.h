// The 1x1 convolutions of a block in training: expand and project, forward and backward.
#pragma once

#include "common/outer_product.h"
#include "mbconv_training/cpu_rows.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

// Calls finish(row, rows, sums, channel, channels) for all of a chunk's product, whose A is
// [rows, depth] with `stride` values a row. A few register tiles of rows get all their channels
// before the next rows do: results then reach memory in its own order.
template <class Finish>
EFFKERNELS_INLINE void product_rows(const float* a, int64_t stride, int64_t rows, int64_t depth,
                                    const float* packed, int64_t channels, Finish&& finish) {
  constexpr int64_t kWide = kTileChannels / kPanel;
  constexpr int64_t kInCache = 98304;  // weights that the second cache keeps beside a chunk
  const int64_t block = depth * channels <= kInCache ? 2 * kTileRows : max_of(rows, 1);
  const int64_t panels = ceil_div(channels, kPanel);
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t some = min_of(block, rows - first);
    for (int64_t panel = 0; panel < panels;) {
      const int64_t here = min_of(panels - panel, kWide), k = panel * kPanel;
      panel += here;
      const int64_t next = panel < panels ? min_of(panel, panels - here) : 0;
      const int64_t width = min_of(channels - k, here * kPanel);
      gemm_rows(a + first * stride, stride, Dense{}, some, packed + k * depth, width, depth,
                packed + next * kPanel * depth, [&](int64_t row, int64_t count, const float* tile) {
                  finish(first + row, count, tile, k, width);
                });
    }
  }
}

// A chunk's rows of input as they enter the product: where they are, or written to `buffer`.
struct Rows {
  const float* data;
  int64_t stride;
};

template <class T>
inline Rows operand_of(const T* input, const Chunks& chunks, int64_t chunk, int64_t channels,
                       const NormVectors& norm, Activation activation, const float* gate,
                       float* buffer) {
  const T* rows = input + chunks.first(chunk) * channels;
  if constexpr (std::is_same_v<T, float>) {
    if (norm.mean == nullptr && gate == nullptr) return {rows, channels};
  }
  const int64_t stride = padded(channels);
  with_activation(activation, [&](auto constant) {
    for_images(chunks, chunk, [&](int64_t image, int64_t row, int64_t count) {
      operand_rows<T, decltype(constant)::value>(
          input + row * channels, count, channels, norm,
          gate == nullptr ? nullptr : gate + image * channels,
          buffer + (row - chunks.first(chunk)) * stride, stride);
    });
  });
  return {buffer, stride};
}

template <class T>
void product(const TrainingProductArgs& args) {
  const int64_t depth = args.in.channels, channels = args.out_channels;
  const Chunks chunks = make_chunks(args.in, args.in.pixels(), max_of(depth, channels));
  const int64_t blocks = chunks.count * chunks.blocks;
  Arena arena{scratch(ScratchUse::kBlock, static_cast<size_t>(kNormVectors * padded(depth) + 64 +
                                                              moments_size(blocks, channels)))};
  const NormVectors norm = norm_vectors(args.norm, depth, arena);
  const Moments moments =
      make_moments(arena.take(moments_size(blocks, channels)), blocks, channels);
  parallel_for(args.parallel, chunks.count, [&](int64_t begin, int64_t end) {
    float* buffer =
        scratch(ScratchUse::kPanelRows, static_cast<size_t>(chunks.rows * padded(depth)));
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const Rows a = operand_of(static_cast<const T*>(args.input), chunks, chunk, depth, norm,
                                args.norm.activation, args.gate, buffer);
      T* out = static_cast<T*>(args.output) + chunks.first(chunk) * channels;
      product_rows(a.data, a.stride, chunks.size(chunk), depth, args.weight, channels,
                   [&](int64_t row, int64_t count, const float* tile, int64_t k, int64_t width) {
                     finish_rows<T>(tile, kTileChannels, count, width, Epilogue{}, k,
                                    static_cast<const T*>(nullptr), out + row * channels + k,
                                    channels, nullptr);
                   });
      chunk_moments(chunks, chunk, out, moments);
    }
  });
  join_moments(
      moments, [&](int64_t b) { return chunks.block_size(b); }, args.mean, args.var, args.parallel);
}

template <class T>
void pool(const TrainingPoolArgs& args) {
  const int64_t channels = args.in.channels;
  const Chunks chunks = make_chunks(args.in, args.in.pixels(), channels);
  const int64_t parts = part_count(chunks, args.in.count);
  Arena arena{scratch(ScratchUse::kBlock, static_cast<size_t>(kNormVectors * padded(channels) + 64 +
                                                              parts * channels))};
  const NormVectors norm = norm_vectors(args.norm, channels, arena);
  float* sums = arena.take(parts * channels);
  with_activation(args.norm.activation, [&](auto activation) {
    parallel_for(args.parallel, chunks.count, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        for_images(chunks, chunk, [&](int64_t image, int64_t row, int64_t count) {
          const T* rows = static_cast<const T*>(args.input) + row * channels;
          float* sum = sums + (chunk + image) * channels;
          for (int64_t c = 0; c < channels; c++) sum[c] = 0.0f;
          for (int64_t first = 0; first < count; first += kSumRows) {
            const int64_t last = min_of(count, first + kSumRows);
            for (int64_t c = 0; c < channels; c += Vec::size) {
              const int64_t n = min_of(channels - c, Vec::size);
              const Vec mean = Vec::load(norm.mean + c), scale = Vec::load(norm.scale + c);
              const Vec bias = Vec::load(norm.bias + c);
              Vec some = Vec::set1(0.0f);
              for (int64_t r = first; r < last; r++) {
                prefetch(rows + (r + kSumRows) * channels + c);
                const Vec d = load_upto(rows + r * channels + c, n) - mean;
                some = some + activate<decltype(activation)::value>(fma(d, scale, bias));
              }
              store_upto(load_upto(sum + c, n) + some, sum + c, n);
            }
          }
        });
      }
    });
  });
  reduce_parts(chunks, args.in.count, sums, channels, 1.0 / static_cast<double>(args.in.pixels()),
               args.pooled, args.parallel);
}

template <class T>
void finish(const TrainingFinishArgs& args) {
  const int64_t channels = args.in.channels;
  const Chunks chunks = make_chunks(args.in, args.in.pixels(), channels);
  Arena arena{
      scratch(ScratchUse::kBlock, static_cast<size_t>(kNormVectors * padded(channels) + 64))};
  const NormVectors norm = norm_vectors(args.norm, channels, arena);
  parallel_for(args.parallel, chunks.count, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      for_images(chunks, chunk, [&](int64_t image, int64_t row, int64_t count) {
        const Vec keep = Vec::set1(args.keep == nullptr ? 1.0f : args.keep[image]);
        for (int64_t at = row * channels; at < (row + count) * channels; at += channels) {
          for (int64_t c = 0; c < channels; c += Vec::size) {
            const int64_t n = min_of(channels - c, Vec::size);
            const Vec d =
                load_upto(static_cast<const T*>(args.input) + at + c, n) - Vec::load(norm.mean + c);
            Vec x = fma(d, Vec::load(norm.scale + c), Vec::load(norm.bias + c)) * keep;
            if (args.residual != nullptr) {
              x = x + load_upto(static_cast<const T*>(args.residual) + at + c, n);
            }
            store_upto(x, static_cast<T*>(args.output) + at + c, n);
          }
        }
      });
    }
  });
}

// ---- Backward

template <class T>
void norm_backward(const TrainingNormBackwardArgs& args) {
  const int64_t channels = args.in.channels;
  const Chunks chunks = make_chunks(args.in, args.in.pixels(), channels);
  float* sums = scratch(ScratchUse::kBlock, static_cast<size_t>(2 * chunks.count * channels));
  parallel_for(args.parallel, chunks.count, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* total = sums + 2 * chunk * channels;
      for (int64_t i = 0; i < 2 * channels; i++) total[i] = 0.0f;
      for_images(chunks, chunk, [&](int64_t image, int64_t row, int64_t count) {
        const Vec keep = Vec::set1(args.keep == nullptr ? 1.0f : args.keep[image]);
        const T* upstream = static_cast<const T*>(args.upstream) + row * channels;
        const T* input = static_cast<const T*>(args.input) + row * channels;
        for (int64_t first = 0; first < count; first += kSumRows) {
          const int64_t last = min_of(count, first + kSumRows);
          for (int64_t c = 0; c < channels; c += Vec::size) {
            const int64_t n = min_of(channels - c, Vec::size);
            const Vec mean = load_upto(args.norm.mean + c, n);
            Vec ts = Vec::set1(0.0f), products = Vec::set1(0.0f);
            for (int64_t r = first; r < last; r++) {
              prefetch(upstream + (r + kSumRows) * channels + c);
              prefetch(input + (r + kSumRows) * channels + c);
              const Vec t = load_upto(upstream + r * channels + c, n) * keep;
              ts = ts + t;
              products = fma(t, load_upto(input + r * channels + c, n) - mean, products);
            }
            store_upto(load_upto(total + c, n) + ts, total + c, n);
            float* product = total + channels + c;
            store_upto(load_upto(product, n) + products, product, n);
          }
        }
      });
    }
  });
  for (int64_t c = 0; c < channels; c++) {
    double t = 0.0, product = 0.0;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      t += sums[2 * chunk * channels + c];
      product += sums[(2 * chunk + 1) * channels + c];
    }
    norm_coefficients(args.norm, c, t, product, static_cast<double>(chunks.pixels),
                      args.coefficients, channels, args.weight_gradient, args.bias_gradient);
  }
}

// The sums of TrainingProductBackwardArgs over `count` rows of one image, [kProductSums, channels].
template <class T, Activation kActivation>
inline void product_sums(const T* gradient, const T* input, int64_t count, int64_t channels,
                         const NormVectors& norm, float* sums) {
  for (int64_t i = 0; i < kProductSums * channels; i++) sums[i] = 0.0f;
  for (int64_t first = 0; first < count; first += kSumRows) {
    const int64_t last = min_of(count, first + kSumRows);
    for (int64_t c = 0; c < channels; c += Vec::size) {
      const int64_t n = min_of(channels - c, Vec::size);
      const Vec mean = Vec::load(norm.mean + c), scale = Vec::load(norm.scale + c);
      const Vec bias = Vec::load(norm.bias + c);
      Vec totals[kProductSums];
      for (Vec& total : totals) total = Vec::set1(0.0f);
      for (int64_t r = first; r < last; r++) {
        const Vec u = load_upto(gradient + r * channels + c, n);
        const Vec d = load_upto(input + r * channels + c, n) - mean;
        const auto [x, s] = activate_with_slope<kActivation>(fma(d, scale, bias));
        const Vec us = u * s;
        totals[0] = fma(u, x, totals[0]);
        totals[1] = totals[1] + us;
        totals[2] = totals[2] + s;
        totals[3] = fma(us, d, totals[3]);
        totals[4] = fma(s, d, totals[4]);
      }
      for (int64_t i = 0; i < kProductSums; i++) {
        float* p = sums + i * channels + c;
        store_upto(load_upto(p, n) + totals[i], p, n);
      }
    }
  }
}

// Partial weight gradients: each is the sum over neighbouring chunks. As many as threads may share
// the work, fewer where they are large.
inline int64_t slot_count(const Chunks& chunks, int64_t values) {
  constexpr int64_t kMost = 16, kFewest = 4, kValues = 4 << 20;
  int64_t slots = kMost;
  while (slots > kFewest && slots * values > kValues) slots /= 2;
  return min_of(slots, chunks.count);
}

// out[m][n], or [n][m] if transposed, = the sum of the slots' [m, padded(n)], in double.
inline void add_slots(const float* slots, int64_t count, int64_t m, int64_t n, bool transposed,
                      float* out, const Parallel& parallel) {
  constexpr int64_t kRows = 16, kColumns = 32;  // of a tile; padded(n) is whole tiles
  parallel_for(parallel, ceil_div(m, kRows), [&](int64_t begin, int64_t end) {
    float tile[kRows][kColumns];
    for (int64_t first = begin * kRows; first < min_of(m, end * kRows); first += kRows) {
      const int64_t rows = min_of(kRows, m - first);
      for (int64_t j = 0; j < n; j += kColumns) {
        const int64_t columns = min_of(kColumns, n - j);
        for (int64_t i = 0; i < rows; i++) {
          double totals[kColumns] = {};
          for (int64_t slot = 0; slot < count; slot++) {
            const float* from = slots + (slot * m + first + i) * padded(n) + j;
            for (int64_t t = 0; t < kColumns; t++) totals[t] += from[t];
          }
          for (int64_t t = 0; t < kColumns; t++) tile[i][t] = static_cast<float>(totals[t]);
        }
        for (int64_t i = 0; !transposed && i < rows; i++) {
          for (int64_t t = 0; t < columns; t++) out[(first + i) * n + j + t] = tile[i][t];
        }
        for (int64_t t = 0; transposed && t < columns; t++) {
          for (int64_t i = 0; i < rows; i++) out[(j + t) * m + first + i] = tile[i][t];
        }
      }
    }
  });
}

template <class T>
void product_backward(const TrainingProductBackwardArgs& args) {
  const int64_t depth = args.in.channels, channels = args.out_channels;
  const int64_t depth_stride = padded(depth), stride = padded(channels);
  const Chunks chunks = make_chunks(args.in, args.in.pixels(), max_of(depth, channels));
  const int64_t parts = args.sums == nullptr ? 0 : part_count(chunks, args.in.count);
  // The longer side of the weight lies along the vectors.
  const bool transposed = channels > depth;
  const int64_t m = transposed ? depth : channels, n = transposed ? channels : depth;
  const int64_t slots = slot_count(chunks, m * padded(n));
  const int64_t weights = args.weight_gradient == nullptr ? 0 : slots * m * padded(n);
  Arena arena{scratch(ScratchUse::kBlock,
                      static_cast<size_t>(kNormVectors * depth_stride + 4 * stride + 256 +
                                          parts * kProductSums * depth + weights))};
  const NormVectors norm = norm_vectors(args.norm, depth, arena);
  float *mean = arena.take(stride), *coefficients = arena.take(3 * stride);
  for (int64_t c = 0; c < stride; c++) {
    mean[c] = c < channels ? args.output_mean[c] : 0.0f;
    for (int64_t i = 0; i < 3; i++) {
      coefficients[i * stride + c] = c < channels ? args.coefficients[i * channels + c] : 0.0f;
    }
  }
  float *sums = arena.take(parts * kProductSums * depth), *gradients = arena.take(weights);
  const T* input = static_cast<const T*>(args.input);
  const T* residual = static_cast<const T*>(args.residual);
  T* input_gradient = static_cast<T*>(args.input_gradient);
  parallel_for(args.parallel, slots, [&](int64_t begin, int64_t end) {
    float* gradient_buffer = scratch(ScratchUse::kRing, static_cast<size_t>(chunks.rows * stride));
    float* buffer =
        scratch(ScratchUse::kPanelRows, static_cast<size_t>(chunks.rows * depth_stride));
    for (int64_t slot = begin; slot < end; slot++) {
      float* total = gradients + slot * m * padded(n);
      for (int64_t i = 0; weights > 0 && i < m * padded(n); i++) total[i] = 0.0f;
      const int64_t last = chunks.count * (slot + 1) / slots;
      for (int64_t chunk = chunks.count * slot / slots; chunk < last; chunk++) {
        const int64_t first = chunks.first(chunk), rows = chunks.size(chunk);
        for_images(chunks, chunk, [&](int64_t image, int64_t row, int64_t count) {
          gradient_rows(static_cast<const T*>(args.upstream) + row * channels,
                        static_cast<const T*>(args.output) + row * channels, count, channels,
                        args.keep == nullptr ? 1.0f : args.keep[image], mean, coefficients,
                        gradient_buffer + (row - first) * stride, stride);
        });
        if (weights > 0) {
          const Rows a = operand_of(input, chunks, chunk, depth, norm, args.norm.activation,
                                    args.gate, buffer);
          if (transposed) {
            outer_product(a.data, a.stride, m, gradient_buffer, stride, n, rows, total, padded(n));
          } else {
            if (a.data != buffer) {  // its rows end with the channels
              operand_rows<T, Activation::none>(input + first * depth, rows, depth, norm, nullptr,
                                                buffer, depth_stride);
            }
            outer_product(gradient_buffer, stride, m, buffer, depth_stride, n, rows, total,
                          padded(n));
          }
        }
        if (input_gradient == nullptr) continue;
        product_rows(gradient_buffer, stride, rows, channels, args.weight, depth,
                     [&](int64_t row, int64_t count, const float* tile, int64_t k, int64_t width) {
                       const int64_t at = (first + row) * depth + k;
                       finish_rows<T>(tile, kTileChannels, count, width, Epilogue{}, k,
                                      residual == nullptr ? nullptr : residual + at,
                                      input_gradient + at, depth, nullptr);
                     });
        if (parts == 0) continue;
        with_activation(args.norm.activation, [&](auto activation) {
          for_images(chunks, chunk, [&](int64_t image, int64_t row, int64_t count) {
            product_sums<T, decltype(activation)::value>(
                input_gradient + row * depth, input + row * depth, count, depth, norm,
                sums + (chunk + image) * kProductSums * depth);
          });
        });
      }
    }
  });
  if (parts > 0) {
    reduce_parts(chunks, args.in.count, sums, kProductSums * depth, 1.0, args.sums, args.parallel);
  }
  if (weights == 0) return;
  add_slots(gradients, slots, m, n, transposed, args.weight_gradient, args.parallel);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
