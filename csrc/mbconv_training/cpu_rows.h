// What the stages of a block in training share: how pixels are cut into tasks, and what a row of
// pixels becomes on its way into a convolution, forward and backward.
#pragma once

#include "common/activation.h"
#include "common/moments.h"
#include "common/reduce.h"
#include "common/scratch.h"
#include "mbconv_training/mbconv_training.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

template <class T>
EFFKERNELS_INLINE Vec load_upto(const T* p, int64_t n) {
  return n == Vec::size ? Vec::load(p) : load_first(p, n);
}

template <class T>
EFFKERNELS_INLINE void store_upto(Vec x, T* p, int64_t n) {
  if (n == Vec::size) {
    x.store(p);
  } else {
    store_first(x, p, n);
  }
}

// Values of `channels` side by side in scratch: whole vectors and panels.
inline int64_t padded(int64_t channels) { return round_up(channels, 32); }

// Working memory handed out piece by piece.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* p = next;
    next += round_up(floats, 16);
    return p;
  }
};

// ---- Tasks

// All pixels of all images, one after the other, in chunks of rows. The cut depends on the shape
// alone, and everything that is summed is summed by chunks in a fixed order: results do not depend
// on the number of threads.
struct Chunks {
  int64_t pixels, image, rows, count, blocks;  // blocks: of kPixelBlock rows, in every chunk

  int64_t first(int64_t chunk) const { return min_of(pixels, chunk * rows); }
  int64_t size(int64_t chunk) const { return first(chunk + 1) - first(chunk); }
  int64_t block_size(int64_t block) const {
    const int64_t rest = size(block / blocks) - block % blocks * kPixelBlock;
    return max_of(0, min_of(kPixelBlock, rest));
  }
};

// A chunk's rows of `channels` values fill half a megabyte: with what is made of them they share a
// second cache with a few panels of weights.
inline Chunks make_chunks(const Images& in, int64_t pixels_of_image, int64_t channels) {
  constexpr int64_t kValues = 131072, kFewest = 56, kMost = 512, kEven = 8;
  const int64_t pixels = in.count * pixels_of_image;
  const int64_t rows = max_of(kFewest, min_of(kMost, kValues / max_of(channels, 1)));
  int64_t count = ceil_div(pixels, rows);
  const int64_t even = round_up(count, kEven);  // the same for every thread
  if (pixels >= even * kFewest) count = even;
  count = max_of(count, 1);
  const int64_t size = ceil_div(pixels, count);
  return {pixels, pixels_of_image, size, max_of(1, ceil_div(pixels, max_of(size, 1))),
          ceil_div(size, kPixelBlock)};
}

// Calls body(image, row, count) for the parts of a chunk that belong to one image each.
template <class F>
EFFKERNELS_INLINE void for_images(const Chunks& chunks, int64_t chunk, F&& body) {
  const int64_t first = chunks.first(chunk), last = first + chunks.size(chunk);
  for (int64_t row = first; row < last;) {
    const int64_t image = row / chunks.image;
    const int64_t end = min_of(last, (image + 1) * chunks.image);
    body(image, row, end - row);
    row = end;
  }
}

// Parts of chunks have numbers, chunk + image, and every image's are neighbours.
inline int64_t part_count(const Chunks& chunks, int64_t images) { return chunks.count + images; }

// out[image][c] = factor * the sum of its parts' rows [parts, channels], in double.
inline void reduce_parts(const Chunks& chunks, int64_t images, const float* parts, int64_t channels,
                         double factor, float* out, const Parallel& parallel) {
  parallel_for(parallel, images, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t first = n * chunks.image / chunks.rows + n;
      const int64_t last = ((n + 1) * chunks.image - 1) / chunks.rows + n;
      for (int64_t c = 0; c < channels; c++) {
        double total = 0.0;
        for (int64_t part = first; part <= last; part++) total += parts[part * channels + c];
        out[n * channels + c] = static_cast<float>(factor * total);
      }
    }
  });
}

// The moments of what a chunk's task has just written.
template <class T>
EFFKERNELS_INLINE void chunk_moments(const Chunks& chunks, int64_t chunk, const T* rows,
                                     const Moments& moments) {
  for (int64_t b = chunk * chunks.blocks; b < (chunk + 1) * chunks.blocks; b++) {
    const int64_t count = chunks.block_size(b);
    if (count == 0) continue;
    block_moments(rows + b % chunks.blocks * kPixelBlock * moments.channels, count, moments, b);
  }
}

// ---- BatchNorm's vectors, padded with zeros to whole vectors

struct NormVectors {
  const float *mean, *scale, *bias;  // null: no norm
};

constexpr int64_t kNormVectors = 3;

inline NormVectors norm_vectors(const TrainingNorm& norm, int64_t channels, Arena& arena) {
  if (norm.mean == nullptr) return {};
  float *mean = arena.take(padded(channels)), *scale = arena.take(padded(channels));
  float* bias = arena.take(padded(channels));
  for (int64_t c = 0; c < padded(channels); c++) {
    const bool inside = c < channels;
    mean[c] = inside ? norm.mean[c] : 0.0f;
    bias[c] = inside && norm.bias != nullptr ? norm.bias[c] : 0.0f;
    scale[c] = 0.0f;
    if (!inside) continue;
    scale[c] = static_cast<float>((norm.weight == nullptr ? 1.0 : norm.weight[c]) /
                                  __builtin_sqrt(static_cast<double>(norm.var[c]) + norm.eps));
  }
  return {mean, scale, bias};
}

// A BatchNorm's backward pass from the sums of t and of t * (input - mean) over n pixels, c one of
// its channels: factor, slope and constant of [3][stride], and its parameters' gradients.
inline void norm_coefficients(const TrainingNorm& norm, int64_t c, double t, double product,
                              double n, float* coefficients, int64_t stride, float* weight_gradient,
                              float* bias_gradient) {
  const double weight = norm.weight == nullptr ? 1.0 : norm.weight[c];
  const double r = 1.0 / __builtin_sqrt(static_cast<double>(norm.var[c]) + norm.eps);
  if (weight_gradient != nullptr) weight_gradient[c] = static_cast<float>(r * product);
  if (bias_gradient != nullptr) bias_gradient[c] = static_cast<float>(t);
  coefficients[c] = static_cast<float>(weight * r);
  coefficients[stride + c] = static_cast<float>(-weight * r * r * r * product / n);
  coefficients[2 * stride + c] = static_cast<float>(-weight * r * t / n);
}

// ---- Rows

// Values between what is read and what is fetched for later. Whole tensors pass by, with long
// computations between the rows: the hardware's own prefetching starts anew each time, and ends
// at each page.
constexpr int64_t kAhead = 4096;

// out[r][c] = gate[c] * activation(norm(rows[r][c])), as float32, `stride` values a row.
template <class T, Activation kActivation>
inline void operand_rows(const T* rows, int64_t count, int64_t channels, const NormVectors& norm,
                         const float* gate, float* out, int64_t stride) {
  for (int64_t r = 0; r < count; r++, rows += channels, out += stride) {
    for (int64_t c = 0; c < channels; c += Vec::size) {
      const int64_t n = min_of(channels - c, Vec::size);
      prefetch(rows + c + kAhead);
      Vec x = load_upto(rows + c, n);
      if (norm.mean != nullptr) {
        const Vec centered = x - Vec::load(norm.mean + c);
        x = activate<kActivation>(
            fma(centered, Vec::load(norm.scale + c), Vec::load(norm.bias + c)));
      }
      if (gate != nullptr) x = x * load_upto(gate + c, n);
      x.store(out + c);
    }
  }
}

// out[r][c] = factor * keep * upstream[r][c] + slope * (output[r][c] - mean) + constant: the
// gradient for a convolution's raw output, through its BatchNorm.
template <class T>
inline void gradient_rows(const T* upstream, const T* output, int64_t count, int64_t channels,
                          float keep, const float* mean, const float* coefficients, float* out,
                          int64_t stride) {
  const int64_t size = padded(channels);
  const Vec factor = Vec::set1(keep);
  for (int64_t r = 0; r < count; r++) {
    for (int64_t c = 0; c < channels; c += Vec::size) {
      const int64_t n = min_of(channels - c, Vec::size), at = r * channels + c;
      prefetch(upstream + at + kAhead);
      prefetch(output + at + kAhead);
      const Vec t = load_upto(upstream + at, n) * factor;
      const Vec d = load_upto(output + at, n) - Vec::load(mean + c);
      const Vec rest =
          fma(d, Vec::load(coefficients + size + c), Vec::load(coefficients + 2 * size + c));
      fma(t, Vec::load(coefficients + c), rest).store(out + r * stride + c);
    }
  }
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
