#include "batch_norm_act/cuda.h"
#include "common/cuda.h"
#include "common/rows.h"

namespace effkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWidest = 32;  // vectors of a row that a block takes: 512 bytes
constexpr int kUnroll = 4;   // accesses under way per thread
constexpr int kMergeChannels = 8, kMergeLanes = 64;  // of a block that merges partial results

__device__ inline int least(int64_t left, int most) {
  return left < most ? static_cast<int>(left) : most;
}

// ---- Sums over the rows of a block

// Sums table[lane][column] over the lanes into table[0]: by all threads, in a fixed order; column c
// is complete for thread c.
__device__ inline void merge_lanes(float* table, int lanes, int columns) {
  const int thread = static_cast<int>(threadIdx.x), most = kThreads / columns;
  const int parts = most < lanes ? (most > 1 ? most : 1) : lanes;
  const int part = thread / columns;
  __syncthreads();
  if (part < parts) {
    float sum = table[thread];
    for (int lane = part + parts; lane < lanes; lane += parts) {
      sum += table[thread + (lane - part) * columns];
    }
    table[thread] = sum;
  }
  __syncthreads();
  if (thread < columns) {
    float sum = table[thread];
    for (int other = 1; other < parts; other++) sum += table[other * columns + thread];
    table[thread] = sum;
  }
}

template <class T>
__device__ inline void store_floats(float* to, const float (&values)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    Words words;
#pragma unroll
    for (int j = 0; j < 4; j++) words.value[j] = values[i + j];
    store_words(to + i, words);
  }
}

template <class T>
struct Statistics {
  const T* input;
  float* partials;  // [blocks, 2, channels]: mean, Σ (x - mean)²; or mean and var, if blocks is 1
  float* mean;
  float* var;
  int64_t rows;
  int block_rows, blocks;
  Tiles tiles;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3) statistics_kernel(Statistics<T> args) {
  constexpr int kV = kVector<T>;
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const int block = static_cast<int>(blockIdx.x) / tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first = int64_t{block} * args.block_rows;
  const int rows = least(args.rows - first, args.block_rows);

  float mean[kV] = {}, squares[kV] = {}, count = 0.0f;
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;
  if (lane.count > 0) {
    int row = lane.row;
    for (; row + (kUnroll - 1) * tiles.lanes < rows; row += kUnroll * tiles.lanes) {
      Words words[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        words[u] = load_first(args.input + at + u * stride, lane.count, args.aligned);
      }
      at += kUnroll * stride;
      // The mean of these few, their distances from it, and how it moves the mean of all so far.
      const float weight = kUnroll / (count + kUnroll);
#pragma unroll
      for (int part = 0; part < kParts<T>; part++) {
        float fresh[4] = {}, x[kUnroll][4];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          unpack_part<T>(words[u], part, x[u]);
#pragma unroll
          for (int i = 0; i < 4; i++) fresh[i] += x[u][i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          fresh[i] *= 1.0f / kUnroll;
          float& sum = squares[4 * part + i];
#pragma unroll
          for (int u = 0; u < kUnroll; u++) {
            const float away = x[u][i] - fresh[i];
            sum += away * away;
          }
          const float distance = fresh[i] - mean[4 * part + i];
          sum += distance * distance * (count * weight);
          mean[4 * part + i] += distance * weight;
        }
      }
      count += kUnroll;
    }
    for (; row < rows; row += tiles.lanes) {  // of the last block
      float x[kV];
      unpack<T>(load_first(args.input + at, lane.count, args.aligned), x);
      at += stride;
      count += 1.0f;
      const float weight = 1.0f / count;
#pragma unroll
      for (int i = 0; i < kV; i++) {
        const float distance = x[i] - mean[i];
        mean[i] += distance * weight;
        squares[i] += distance * (x[i] - mean[i]);
      }
    }
  }

  // Tables with a row for each lane. Distances from the first lane's mean are small, and so is what
  // rounding takes from their sum.
  const int columns = tiles.width * kV, thread = static_cast<int>(threadIdx.x);
  float* means = reinterpret_cast<float*>(dynamic_shared());
  float* sums = means + tiles.lanes * columns;
  float* moved = sums + tiles.lanes * columns;
  if (lane.row < tiles.lanes) {
    const int place = lane.row * columns + lane.c - chunk * columns;
    store_floats<T>(means + place, mean);
    store_floats<T>(sums + place, squares);
  }
  __syncthreads();
  const auto each = [&](auto&& f) {  // f(index, column, rows of this lane)
    for (int i = thread; i < tiles.lanes * columns; i += kThreads) {
      const int row = i / columns, of_lane = (rows - row + tiles.lanes - 1) / tiles.lanes;
      f(i, i - row * columns, of_lane > 0 ? static_cast<float>(of_lane) : 0.0f);
    }
  };
  each([&](int i, int column, float of_lane) {
    moved[i] = of_lane > 0.0f ? of_lane * (means[i] - means[column]) : 0.0f;
  });
  merge_lanes(moved, tiles.lanes, columns);
  if (thread < columns) moved[thread] = means[thread] + moved[thread] / static_cast<float>(rows);
  __syncthreads();
  each([&](int i, int column, float of_lane) {
    const float distance = means[i] - moved[column];
    if (of_lane > 0.0f) sums[i] += of_lane * distance * distance;
  });
  merge_lanes(sums, tiles.lanes, columns);
  const int c = chunk * columns + thread;
  if (thread < columns && c < tiles.channels) {
    if (args.blocks == 1) {
      args.mean[c] = moved[thread];
      args.var[c] = sums[thread] / static_cast<float>(rows);
    } else {
      float* partial = args.partials + int64_t{block} * 2 * tiles.channels + c;
      partial[0] = moved[thread];
      partial[tiles.channels] = sums[thread];
    }
  }
}

// The sum over a block of `value`, in every thread, for threads with the same threadIdx.x %
// kMergeChannels; `table` has kMergeLanes rows of them.
__device__ inline float merge_sum(float* table, float value) {
  const int column = threadIdx.x % kMergeChannels, lane = threadIdx.x / kMergeChannels;
  __syncthreads();
  table[lane * kMergeChannels + column] = value;
  __syncthreads();
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    if (lane < half) {
      table[lane * kMergeChannels + column] += table[(lane + half) * kMergeChannels + column];
    }
    __syncthreads();
  }
  return table[column];
}

struct Merge {
  const float* partials;  // [blocks, 2, channels]
  float* mean;
  float* var;
  int64_t rows;
  int block_rows, blocks, channels;
};

__global__ void __launch_bounds__(kMergeChannels* kMergeLanes) merge_statistics_kernel(Merge args) {
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x / kMergeChannels;
  const int c = static_cast<int>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t stride = int64_t{2} * args.channels;
  const float* from = args.partials + c;
  const float rows = static_cast<float>(args.rows), usual = static_cast<float>(args.block_rows);
  const float last = static_cast<float>(args.rows - int64_t{args.blocks - 1} * args.block_rows);
  // Distances from the first block's mean are small, and so is what rounding takes from them.
  const float start = c < args.channels ? from[0] : 0.0f;
  float moved = 0.0f, squares = 0.0f;
  if (c < args.channels) {
#pragma unroll 4
    for (int block = lane; block < args.blocks; block += kMergeLanes) {
      const float count = block == args.blocks - 1 ? last : usual;
      moved += count * (from[block * stride] - start);
    }
  }
  const float mean = start + merge_sum(table, moved) / rows;
  if (c < args.channels) {
#pragma unroll 4
    for (int block = lane; block < args.blocks; block += kMergeLanes) {
      const float count = block == args.blocks - 1 ? last : usual;
      const float distance = from[block * stride] - mean;
      squares += from[block * stride + args.channels] + count * distance * distance;
    }
  }
  squares = merge_sum(table, squares);
  if (lane == 0 && c < args.channels) {
    args.mean[c] = mean;
    args.var[c] = squares / rows;
  }
}

// ---- What normalises

struct Normalization {
  Values mean, var, weight, bias;
  float eps;
};

template <class T>
__device__ inline float factor_of(const Normalization& n, int c) {
  const float factor = rsqrtf(value_at<T>(n.var, c) + n.eps);
  return n.weight.data ? factor * value_at<T>(n.weight, c) : factor;
}

// The rows of the table of a block's channels: before = (x - mean) * scale + bias.
enum { kMean, kScale, kBias, kNormalization };

// `slope`, if there is one, adds the rows kSlope and kConstant of the gradient.
enum { kSlope = kNormalization, kConstant, kGradient };

template <class T>
__device__ inline void fill_table(float* table, const Normalization& n, const float* slope,
                                  const Tiles& tiles, int chunk) {
  const int columns = tiles.width * kVector<T>;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    const int c = chunk * columns + column;
    const bool inside = c < tiles.channels;
    float* to = table + table_place<T>(tiles, column);
    to[kMean * columns] = inside ? value_at<T>(n.mean, c) : 0.0f;
    to[kScale * columns] = inside ? factor_of<T>(n, c) : 0.0f;
    to[kBias * columns] = inside && n.bias.data ? value_at<T>(n.bias, c) : 0.0f;
    if (slope) {
      to[kSlope * columns] = inside ? slope[c] : 0.0f;
      to[kConstant * columns] = inside ? slope[tiles.channels + c] : 0.0f;
    }
  }
}

constexpr int kApplyBlocks = 4;

template <class T>
struct Apply {
  T* output;
  const T* input;
  const T* residual;
  Normalization normalization;
  int64_t rows;
  int steps;
  Tiles tiles;
  bool aligned;
  Activation activation;
};

template <class T, bool kResidual>
__global__ void __launch_bounds__(kThreads, kApplyBlocks) apply_kernel(Apply<T> args) {
  constexpr int kRows = kResidual ? kUnroll / 2 : kUnroll;
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x / tiles.chunks) * (args.steps * kRows * tiles.lanes);
  const int left = least(args.rows - first - lane.row, args.steps * kRows * tiles.lanes);
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  Words x[kRows], added[kRows];
  const auto fetch = [&](int done) {
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      const int count = done + u * tiles.lanes < left ? lane.count : 0;
      x[u] = load_first(args.input + at + u * stride, count, args.aligned);
      if (kResidual) added[u] = load_first(args.residual + at + u * stride, count, args.aligned);
    }
  };
  fetch(0);
  fill_table<T>(table, args.normalization, nullptr, tiles, chunk);
  __syncthreads();
  if (lane.count == 0) return;
  for (int done = 0; done < left;) {
    with_activation(args.activation, [&](auto constant) {
#pragma unroll
      for (int part = 0; part < kParts<T>; part++) {
        float mean[4], scale[4], bias[4];
        load_part<T>(table, kMean, tiles, lane, part, mean);
        load_part<T>(table, kScale, tiles, lane, part, scale);
        load_part<T>(table, kBias, tiles, lane, part, bias);
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          float values[4], other[4];
          unpack_part<T>(x[u], part, values);
          if (kResidual) unpack_part<T>(added[u], part, other);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            values[i] = (values[i] - mean[i]) * scale[i] + bias[i];
            if (kResidual) values[i] += other[i];
            values[i] = activate<decltype(constant){}()>(values[i]);
          }
          pack_part<T>(values, part, x[u]);
        }
      }
    });
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      const int count = done + u * tiles.lanes < left ? lane.count : 0;
      store_first(args.output + at + u * stride, count, args.aligned, x[u]);
    }
    done += kRows * tiles.lanes;
    at += kRows * stride;
    if (done < left) fetch(done);
  }
}

// ---- The gradient
//
// t = upstream * activation'(before); with xc = x - mean and the sums over all rows of t and t * xc
//   input_gradient = factor * t + slope * xc + constant

struct Finish {
  const float* partials;  // [blocks, 2, channels]: Σ t, Σ t * (x - mean)
  Normalization normalization;
  Written weight_gradient, bias_gradient, mean_gradient, var_gradient;
  const float* mean_upstream;
  const float* var_upstream;
  float* slope;  // [2, channels] with the constants behind, or null
  float rows;
  int blocks, channels;
  bool training;
};

template <class T>
__device__ inline void write(const Written& to, int c, float value) {
  if (!to.data) return;
  if (to.is_float) {
    static_cast<float*>(to.data)[c] = value;
  } else {
    static_cast<T*>(to.data)[c] = from_float<T>(value);
  }
}

template <class T>
__device__ inline void finish_gradient(const Finish& args, int c, float total, float product) {
  const Normalization& n = args.normalization;
  const float deviation = rsqrtf(value_at<T>(n.var, c) + n.eps);
  const float factor = n.weight.data ? deviation * value_at<T>(n.weight, c) : deviation;
  product *= deviation;
  write<T>(args.weight_gradient, c, product);
  write<T>(args.bias_gradient, c, total);
  if (args.training) {
    if (!args.slope) return;
    float slope = -factor * deviation * product / args.rows;
    float constant = -factor * total / args.rows;
    if (args.var_upstream) slope += 2.0f * args.var_upstream[c] / args.rows;
    if (args.mean_upstream) constant += args.mean_upstream[c] / args.rows;
    args.slope[c] = slope;
    args.slope[args.channels + c] = constant;
  } else {
    write<T>(args.mean_gradient, c, -factor * total);
    write<T>(args.var_gradient, c, -0.5f * factor * deviation * product);
  }
}

template <class T>
struct Sums {
  const T* upstream;
  const T* input;
  const T* residual;
  Finish finish;
  float* partials;
  int64_t rows;
  int block_rows;
  Tiles tiles;
  bool aligned;
  Activation activation;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gradient_sums_kernel(Sums<T> args) {
  constexpr int kV = kVector<T>, kRows = kUnroll / 2;
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const int block = static_cast<int>(blockIdx.x) / tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first = int64_t{block} * args.block_rows;
  const int rows = least(args.rows - first, args.block_rows);
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  float* table = reinterpret_cast<float*>(dynamic_shared());
  fill_table<T>(table, args.finish.normalization, nullptr, tiles, chunk);
  __syncthreads();
  float total[kV] = {}, product[kV] = {};
  if (lane.count > 0) {
    for (int row = lane.row; row < rows; row += kRows * tiles.lanes) {
      Words upstream[kRows], words[kRows], added[kRows];
#pragma unroll
      for (int u = 0; u < kRows; u++) {  // zero past the last row, and so is t
        const int count = row + u * tiles.lanes < rows ? lane.count : 0;
        upstream[u] = load_first(args.upstream + at + u * stride, count, args.aligned);
        words[u] = load_first(args.input + at + u * stride, count, args.aligned);
        if (args.residual) {
          added[u] = load_first(args.residual + at + u * stride, count, args.aligned);
        }
      }
      at += kRows * stride;
      with_activation(args.activation, [&](auto constant) {
#pragma unroll
        for (int part = 0; part < kParts<T>; part++) {
          float mean[4], scale[4], bias[4];
          load_part<T>(table, kMean, tiles, lane, part, mean);
          load_part<T>(table, kScale, tiles, lane, part, scale);
          load_part<T>(table, kBias, tiles, lane, part, bias);
#pragma unroll
          for (int u = 0; u < kRows; u++) {
            float x[4], t[4], other[4];
            unpack_part<T>(words[u], part, x);
            unpack_part<T>(upstream[u], part, t);
            if (args.residual) unpack_part<T>(added[u], part, other);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              x[i] -= mean[i];
              float before = x[i] * scale[i] + bias[i];
              if (args.residual) before += other[i];
              t[i] *= slope<decltype(constant){}()>(before);
              total[4 * part + i] += t[i];
              product[4 * part + i] += t[i] * x[i];
            }
          }
        }
      });
    }
  }
  __syncthreads();  // the sums take the table's place

  const int columns = tiles.width * kV;
  float* totals = reinterpret_cast<float*>(dynamic_shared());
  float* products = totals + tiles.lanes * columns;
  if (lane.row < tiles.lanes) {
    const int at = lane.row * columns + lane.c - chunk * columns;
    store_floats<T>(totals + at, total);
    store_floats<T>(products + at, product);
  }
  merge_lanes(totals, tiles.lanes, columns);
  merge_lanes(products, tiles.lanes, columns);
  const int c = chunk * columns + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < columns && c < tiles.channels) {
    if (args.finish.blocks == 1) {
      finish_gradient<T>(args.finish, c, totals[threadIdx.x], products[threadIdx.x]);
    } else {
      float* partial = args.partials + int64_t{block} * 2 * tiles.channels + c;
      partial[0] = totals[threadIdx.x];
      partial[tiles.channels] = products[threadIdx.x];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMergeChannels* kMergeLanes)
    merge_gradient_sums_kernel(Finish args) {
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x / kMergeChannels;
  const int c = static_cast<int>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t stride = int64_t{2} * args.channels;
  float total = 0.0f, product = 0.0f;
  if (c < args.channels) {
#pragma unroll 4
    for (int block = lane; block < args.blocks; block += kMergeLanes) {
      total += args.partials[block * stride + c];
      product += args.partials[block * stride + args.channels + c];
    }
  }
  total = merge_sum(table, total);
  product = merge_sum(table, product);
  if (lane == 0 && c < args.channels) finish_gradient<T>(args, c, total, product);
}

template <class T>
struct Differentiate {
  T* input_gradient;
  T* residual_gradient;
  const T* upstream;
  const T* input;
  const T* residual;
  const float* slope;  // [2, channels], or null
  Normalization normalization;
  int64_t rows;
  int steps;
  Tiles tiles;
  bool aligned, reads_input;
  Activation activation;
};

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    differentiate_kernel(Differentiate<T> args) {
  constexpr int kRows = kUnroll / 2;
  float* table = reinterpret_cast<float*>(dynamic_shared());
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first =
      static_cast<int64_t>(blockIdx.x / tiles.chunks) * (args.steps * kRows * tiles.lanes);
  const int left = least(args.rows - first - lane.row, args.steps * kRows * tiles.lanes);
  int64_t at = (first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  Words upstream[kRows], words[kRows], added[kRows];
  const auto fetch = [&](int done) {
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      const int count = done + u * tiles.lanes < left ? lane.count : 0;
      upstream[u] = load_first(args.upstream + at + u * stride, count, args.aligned);
      words[u] =
          load_first(args.input + at + u * stride, args.reads_input ? count : 0, args.aligned);
      if (args.residual) {
        added[u] = load_first(args.residual + at + u * stride, count, args.aligned);
      }
    }
  };
  fetch(0);
  fill_table<T>(table, args.normalization, args.slope, tiles, chunk);
  __syncthreads();
  if (lane.count == 0) return;
  for (int done = 0; done < left;) {
    with_activation(args.activation, [&](auto chosen) {
#pragma unroll
      for (int part = 0; part < kParts<T>; part++) {
        float mean[4], scale[4], bias[4], slopes[4] = {}, constant[4] = {};
        load_part<T>(table, kMean, tiles, lane, part, mean);
        load_part<T>(table, kScale, tiles, lane, part, scale);
        load_part<T>(table, kBias, tiles, lane, part, bias);
        if (args.slope) {
          load_part<T>(table, kSlope, tiles, lane, part, slopes);
          load_part<T>(table, kConstant, tiles, lane, part, constant);
        }
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          float x[4], t[4], other[4];
          unpack_part<T>(words[u], part, x);
          unpack_part<T>(upstream[u], part, t);
          if (args.residual) unpack_part<T>(added[u], part, other);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            x[i] -= mean[i];
            float before = x[i] * scale[i] + bias[i];
            if (args.residual) before += other[i];
            t[i] *= slope<decltype(chosen){}()>(before);
            x[i] = t[i] * scale[i] + (x[i] * slopes[i] + constant[i]);
          }
          pack_part<T>(t, part, upstream[u]);
          pack_part<T>(x, part, words[u]);
        }
      }
    });
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      const int count = done + u * tiles.lanes < left ? lane.count : 0;
      if (args.residual_gradient) {
        store_first(args.residual_gradient + at + u * stride, count, args.aligned, upstream[u]);
      }
      if (args.input_gradient) {
        store_first(args.input_gradient + at + u * stride, count, args.aligned, words[u]);
      }
    }
    done += kRows * tiles.lanes;
    at += kRows * stride;
    if (done < left) fetch(done);
  }
}

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
         table_bytes(tiles, kVector<T>, 3 * tiles.lanes), args.stream, statistics);
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
  // A tensor that no derivative depends on is not read.
  const void* residual = args.activation == Activation::none ? nullptr : args.residual;
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
