#include "common/cuda.h"
#include "common/rows.h"
#include "squeeze_excite/cuda.h"

namespace effkernels {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kRows = 4;   // of the first matrix that a warp multiplies at once
constexpr int kSteps = 4;  // channels of the second matrix that a lane has under way

// ---- Vectors in shared memory. Lanes that read 8 floats each, next to each other, would meet in
// the banks: the first four of every eight lie in one plane, the others in a second one.

template <class T>
__device__ inline int place(int index, int padded) {
  if constexpr (kVector<T> == 4) return index;
  return index / 8 * 4 + index % 4 + (index % 8 / 4) * (padded / 2);
}

template <class T>
__device__ inline void load_planes(const float* vector, int padded, int v,
                                   float (&values)[kVector<T>]) {
#pragma unroll
  for (int half = 0; half < kVector<T> / 4; half++) {
    const Words words = load_words(vector + half * (padded / 2) + v * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) values[4 * half + i] = words.value[i];
  }
}

template <class T>
struct Gate {
  T* gate;
  Values mean;
  const T* reduce_weight;
  Values reduce_bias;
  const T* expand_weight;
  Values expand_bias;
  int images, blocks, channels, reduced;
  float factor;
  Activation activation, gate_activation;
  bool mean_aligned, reduce_aligned, expand_aligned;
  int parts;          // threads that share the partial sums of a channel
  int splits;         // warps that share a row of the first matrix
  int lanes;          // that share a row of the second matrix: 4, 8, 16 or 32
  int slices, slice;  // blocks that share the channels, channels of each

  __host__ __device__ int padded() const {
    return (channels + kVector<T> - 1) / kVector<T> * kVector<T>;
  }
  __host__ __device__ int padded_reduced() const {
    return (reduced + kVector<T> - 1) / kVector<T> * kVector<T>;
  }
  // Floats of shared memory: the means, the hidden vectors, what threads add up.
  __host__ __device__ int scratch(int images_per_block) const {
    const int sums = parts > 1 ? parts * images_per_block * padded() : 0;
    const int products = splits * images_per_block * reduced;
    return sums > products ? sums : products;
  }
};

// mean[image][place(c)] of kImages images from `first` on, zero where there is none.
template <class T, int kImages>
__device__ inline void load_means(const Gate<T>& args, int first, float* mean, float* scratch) {
  const int padded = args.padded(), quads = padded / 4, items = kImages * quads;
  const int channels = args.channels;
  for (int i = threadIdx.x; i < items * args.parts; i += kThreads) {
    const int part = i / items, item = i - part * items;
    const int image = item / quads, c = (item - image * quads) * 4;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first + image < args.images) {
      const int64_t base = int64_t{first + image} * args.blocks * channels + c;
      if (args.mean_aligned && c < channels) {
        const float* from = static_cast<const float*>(args.mean.data) + base;
#pragma unroll 4
        for (int b = part; b < args.blocks; b += args.parts) {
          const Words words = load_words(from + int64_t{b} * channels);
#pragma unroll
          for (int j = 0; j < 4; j++) sum[j] += words.value[j];
        }
      } else {
#pragma unroll 2
        for (int b = part; b < args.blocks; b += args.parts) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
            if (c + j < channels)
              sum[j] += value_at<T>(args.mean, base + int64_t{b} * channels + j);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (args.parts == 1) {
        mean[image * padded + place<T>(c + j, padded)] = sum[j] * args.factor;
      } else {
        scratch[(part * kImages + image) * padded + c + j] = sum[j];
      }
    }
  }
  __syncthreads();
  if (args.parts == 1) return;
  for (int i = threadIdx.x; i < kImages * padded; i += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < args.parts; part++) sum += scratch[part * kImages * padded + i];
    const int image = i / padded;
    mean[image * padded + place<T>(i - image * padded, padded)] = sum * args.factor;
  }
  __syncthreads();
}

// The first matrix times the means: scratch[split][image][r], to be added up. The means are made
// while the first rows are on their way.
template <class T, int kImages>
__device__ inline void multiply_means(const Gate<T>& args, int first, float* mean, float* scratch) {
  const int lane = threadIdx.x % kWarp, padded = args.padded(), vectors = padded / kVector<T>;
  const int groups = (args.reduced + kRows - 1) / kRows;
  const int span = ((vectors + args.splits - 1) / args.splits + kWarp - 1) / kWarp * kWarp;
  const auto fetch = [&](int task, int start, Words(&words)[kRows]) {
    const int r = task % groups * kRows, v = start + lane;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const int count = r + i < args.reduced ? args.channels - v * kVector<T> : 0;
      words[i] = load_first(args.reduce_weight + int64_t{r + i} * args.channels + v * kVector<T>,
                            count, args.reduce_aligned);
    }
  };
  int task = static_cast<int>(threadIdx.x) / kWarp;
  Words following[kRows];
  if (task < groups * args.splits) fetch(task, task / groups * span, following);
  load_means<T, kImages>(args, first, mean, scratch);
  for (; task < groups * args.splits; task += kWarps) {
    const int split = task / groups, begin = split * span;
    const int end = begin + span < vectors ? begin + span : vectors;
    if (task >= kWarps) fetch(task, begin, following);
    float sum[kRows][kImages] = {};
    for (int start = begin; start < end; start += kWarp) {
      float weight[kRows][kVector<T>];
#pragma unroll
      for (int i = 0; i < kRows; i++) unpack<T>(following[i], weight[i]);
      if (start + kWarp < end) fetch(task, start + kWarp, following);
      if (start + lane < vectors) {
#pragma unroll
        for (int image = 0; image < kImages; image++) {
          float values[kVector<T>];
          load_planes<T>(mean + image * padded, padded, start + lane, values);
#pragma unroll
          for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int j = 0; j < kVector<T>; j++) sum[i][image] += weight[i][j] * values[j];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const int r = task % groups * kRows + i;
#pragma unroll
      for (int image = 0; image < kImages; image++) {
        const float total = warp_sum(sum[i][image]);
        if (lane == 0 && r < args.reduced) {
          scratch[(split * kImages + image) * args.reduced + r] = total;
        }
      }
    }
  }
}

// hidden[image][place(r)] = activation of the sum of what `multiply_means` left, zero past the end.
// `use` gets (image, r, before the activation, after it), too.
template <class T, int kImages, class F>
__device__ inline void activate_hidden(const Gate<T>& args, const float* scratch, float* hidden,
                                       F&& use) {
  const int reduced = args.reduced, padded = args.padded_reduced();
  for (int i = threadIdx.x; i < kImages * padded; i += kThreads) {
    const int image = i / padded, r = i - image * padded;
    float value = 0.0f;
    if (r < reduced) {
      for (int split = 0; split < args.splits; split++) {
        value += scratch[(split * kImages + image) * reduced + r];
      }
      if (args.reduce_bias.data) value += value_at<T>(args.reduce_bias, r);
      float activated[1] = {value};
      activate_all(args.activation, activated);
      use(image, r, value, activated[0]);
      value = activated[0];
    }
    hidden[image * padded + place<T>(r, padded)] = value;
  }
}

// Calls finish(c, sums of kImages images) with the second matrix times `hidden` for each channel
// of [begin, end), by one thread each. `wait` is called when the first rows are on their way.
template <class T, int kImages, class Wait, class F>
__device__ inline void multiply_hidden(const Gate<T>& args, const float* hidden, int begin, int end,
                                       Wait&& wait, F&& finish) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int reduced = args.reduced, padded = args.padded_reduced(), vectors = padded / kVector<T>;
  const int lanes = args.lanes, rows = kWarp / lanes, own = lane % lanes, group = lane / lanes;
  const auto fetch = [&](int base, int start, Words(&words)[kSteps]) {
    const int at = (start + own) * kVector<T>;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int c = base + step * rows + group;
      words[step] = load_first(args.expand_weight + int64_t{c} * reduced + at,
                               c < end ? reduced - at : 0, args.expand_aligned);
    }
  };
  Words words[kSteps];
  int base = begin + warp * kSteps * rows;
  fetch(base, 0, words);
  wait();
  for (bool first = true; base < end; base += kWarps * kSteps * rows, first = false) {
    float sum[kSteps][kImages] = {};
    for (int start = 0; start < vectors; start += lanes) {
      if (!first || start > 0) fetch(base, start, words);
      if (start + own < vectors) {
#pragma unroll
        for (int image = 0; image < kImages; image++) {
          float values[kVector<T>];
          load_planes<T>(hidden + image * padded, padded, start + own, values);
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            float weight[kVector<T>];
            unpack<T>(words[step], weight);
#pragma unroll
            for (int j = 0; j < kVector<T>; j++) sum[step][image] += weight[j] * values[j];
          }
        }
      }
    }
    // Each lane gives away half of its channels and adds to the others, twice: three shuffles for
    // four channels where one by one they would take eight.
    float total[kImages];
#pragma unroll
    for (int image = 0; image < kImages; image++) {
      float half[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float kept = lane & 1 ? sum[k + 2][image] : sum[k][image];
        const float given = lane & 1 ? sum[k][image] : sum[k + 2][image];
        half[k] = kept + __shfl_xor_sync(kAllLanes, given, 1);
      }
      const float kept = lane & 2 ? half[1] : half[0], given = lane & 2 ? half[0] : half[1];
      total[image] = kept + __shfl_xor_sync(kAllLanes, given, 2);
      for (int distance = 4; distance < lanes; distance *= 2) {
        total[image] += __shfl_xor_sync(kAllLanes, total[image], distance);
      }
    }
    const int c = base + ((lane & 1) * 2 + (lane & 2) / 2) * rows + group;
    if (own < 4 && c < end) finish(c, total);
  }
}

template <class T, int kImages>
__global__ void __launch_bounds__(kThreads) gate_kernel(Gate<T> args) {
  float* mean = reinterpret_cast<float*>(dynamic_shared());
  float* hidden = mean + kImages * args.padded();
  float* scratch = hidden + kImages * args.padded_reduced();
  const int slice = static_cast<int>(blockIdx.x) % args.slices;
  const int first = static_cast<int>(blockIdx.x) / args.slices * kImages;
  const int begin = slice * args.slice;
  const int end = begin + args.slice < args.channels ? begin + args.slice : args.channels;

  multiply_means<T, kImages>(args, first, mean, scratch);
  const auto wait = [&] {
    __syncthreads();
    activate_hidden<T, kImages>(args, scratch, hidden, [](int, int, float, float) {});
    __syncthreads();
  };
  multiply_hidden<T, kImages>(args, hidden, begin, end, wait, [&](int c, float (&values)[kImages]) {
    const float bias = args.expand_bias.data ? value_at<T>(args.expand_bias, c) : 0.0f;
#pragma unroll
    for (int image = 0; image < kImages; image++) values[image] += bias;
    activate_all(args.gate_activation, values);
#pragma unroll
    for (int image = 0; image < kImages; image++) {
      if (first + image < args.images) {
        args.gate[int64_t{first + image} * args.channels + c] = from_float<T>(values[image]);
      }
    }
  });
}

template <class T>
Gate<T> gate_of(const GateWeights& weights, const Values& mean, int64_t images, int64_t blocks,
                double factor, int images_per_block) {
  constexpr int kV = kVector<T>;
  Gate<T> args;
  args.gate = nullptr;
  args.mean = mean;
  args.reduce_weight = static_cast<const T*>(weights.reduce_weight);
  args.reduce_bias = weights.reduce_bias;
  args.expand_weight = static_cast<const T*>(weights.expand_weight);
  args.expand_bias = weights.expand_bias;
  args.images = static_cast<int>(images);
  args.blocks = static_cast<int>(blocks);
  args.channels = static_cast<int>(weights.channels);
  args.reduced = static_cast<int>(weights.reduced);
  args.factor = static_cast<float>(factor);
  args.activation = weights.activation;
  args.gate_activation = weights.gate_activation;
  args.mean_aligned = mean.is_float && weights.channels % 4 == 0 && is_aligned(mean.data);
  args.reduce_aligned = weights.channels % kV == 0 && is_aligned(weights.reduce_weight);
  args.expand_aligned = weights.reduced % kV == 0 && is_aligned(weights.expand_weight);
  const int64_t items = int64_t{images_per_block} * args.padded() / 4;
  args.parts = static_cast<int>(max_of(1, min_of(blocks, kThreads / items)));
  const int64_t groups = ceil_div(weights.reduced, kRows);
  const int64_t steps = ceil_div(args.padded() / kV, kWarp);
  args.splits = static_cast<int>(max_of(1, min_of(kWarps / groups, steps)));
  args.lanes = 4;
  while (args.lanes < kWarp && args.lanes * kV < args.reduced) args.lanes *= 2;
  args.slices = 1;
  args.slice = args.channels;
  return args;
}

template <class T>
int64_t shared_bytes(const Gate<T>& args, int images_per_block) {
  const int64_t vectors = images_per_block * (int64_t{args.padded()} + args.padded_reduced());
  return 4 * (vectors + args.scratch(images_per_block));
}

template <class T, int kImages>
void run_gate(const SqueezeExciteGateCuda& args) {
  Gate<T> gate =
      gate_of<T>(args.weights, args.mean, args.images, args.blocks, args.factor, kImages);
  gate.gate = static_cast<T*>(args.gate);
  // Slices of the channels while processors are left; 64 channels keep four warps busy.
  const int64_t groups = ceil_div(args.images, kImages);
  const int64_t wanted = max_of(1, device_properties().processors / groups);
  const int64_t slice = max_of(64, round_up(ceil_div(gate.channels, wanted), 16));
  gate.slice = static_cast<int>(min_of(slice, gate.channels));
  gate.slices = static_cast<int>(ceil_div(gate.channels, gate.slice));
  launch(gate_kernel<T, kImages>, dim3(static_cast<unsigned>(groups * gate.slices)), kThreads,
         shared_bytes(gate, kImages), args.stream, gate);
}

constexpr int kManyImages = 4;  // of a block, where there are enough

}  // namespace

bool squeeze_excite_fits(int64_t channels, int64_t reduced) {
  // Means and hidden vectors, and sums of both by several threads, where these are short.
  const int64_t floats = channels + 2 * reduced + 4 * kThreads + 64;
  return 4 * floats <= device_properties().shared_memory;
}

void squeeze_excite_gate_cuda(const SqueezeExciteGateCuda& args) {
  if (args.images == 0 || args.weights.channels == 0) return;
  with_dtype(args.weights.dtype, [&](auto value) {
    using T = decltype(value);
    // Four images read the weights once, but need four times the arithmetic of a block.
    const Gate<T> many =
        gate_of<T>(args.weights, args.mean, args.images, args.blocks, args.factor, kManyImages);
    const bool fits = shared_bytes(many, kManyImages) <= device_properties().shared_memory / 2;
    if (2 * args.images >= device_properties().processors && fits) {
      run_gate<T, kManyImages>(args);
    } else {
      run_gate<T, 1>(args);
    }
  });
}

}  // namespace effkernels
