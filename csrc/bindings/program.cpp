#include "bindings/program.h"

#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <variant>

#include "batch_norm_act/batch_norm_act.h"
#include "common/scratch.h"
#include "conv/conv.h"
#include "depthwise_conv/depthwise_conv.h"
#include "mbconv/mbconv.h"
#include "pointwise_conv/pointwise_conv.h"
#include "silu/silu.h"
#include "squeeze_excite/squeeze_excite.h"

namespace effkernels {
namespace {

// A step: kind, input, residual, output and mean (values, -1: none), whether the input is NCHW,
// geometry, activations, weights (indices, -1: none; in the order of the op's own arguments).
constexpr size_t kPlanarAt = 5, kGeometryAt = 6, kActivationsAt = 14, kWeightsAt = 18;
constexpr size_t kStepNumbers = 31;
enum Kind : int64_t {
  kConv,
  kPointwiseConv,
  kDepthwiseConv,
  kMBConv,
  kSqueezeExcite,
  kSilu,
  kBatchNormAct,
  kCopy
};

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Value {
  int64_t height, width, channels, place;
  int64_t size() const { return height * width * channels; }
  Images images(int64_t count) const { return {count, height, width, channels}; }
};

// Channels [from, from + count) of the input become channels [to, to + count) of the output; what
// else the output has comes from other steps.
struct CopyArgs {
  DType dtype;
  void* output;       // [count, height, width, out_channels]
  const void* input;  // [count, height, width, channels]
  Images in;
  int64_t out_channels, from, to, count;
  Parallel parallel;
};

struct Step {
  // With everything that does not change from run to run.
  std::variant<ConvArgs, PointwiseConvArgs, DepthwiseConvArgs, MBConvArgs, SqueezeExciteArgs,
               SiluArgs, BatchNormActArgs, CopyArgs>
      args;
  int64_t input, residual, output, mean;
};

// Calls the op that the arguments belong to.
void call(const ConvArgs& args) { conv_cpu(args); }
void call(const PointwiseConvArgs& args) { pointwise_conv_cpu(args); }
void call(const DepthwiseConvArgs& args) { depthwise_conv_cpu(args); }
void call(const MBConvArgs& args) { mbconv_cpu(args); }
void call(const SqueezeExciteArgs& args) { squeeze_excite_cpu(args); }
void call(const SiluArgs& args) { silu_cpu(args); }
void call(const BatchNormActArgs& args) { batch_norm_act_cpu(args); }
void call(const CopyArgs& args) {
  constexpr int64_t kPixels = 64;  // of a task
  const int64_t size = size_of(args.dtype), pixels = args.in.count * args.in.pixels();
  const auto* input = static_cast<const char*>(args.input) + args.from * size;
  auto* output = static_cast<char*>(args.output) + args.to * size;
  parallel_for(args.parallel, ceil_div(pixels, kPixels), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * kPixels; p < min_of(pixels, end * kPixels); p++) {
      std::memcpy(output + p * args.out_channels * size, input + p * args.in.channels * size,
                  static_cast<size_t>(args.count * size));
    }
  });
}

void set_residual(ConvArgs& args, const void* residual) { args.epilogue.residual = residual; }
void set_residual(PointwiseConvArgs& args, const void* residual) {
  args.epilogue.residual = residual;
}
void set_residual(BatchNormActArgs& args, const void* residual) { args.residual = residual; }
void set_residual(SiluArgs& args, const void* residual) { args.residual = residual; }
void set_residual(MBConvArgs& args, const void* residual) { args.project.residual = residual; }
template <class Args>
void set_residual(Args&, const void* residual) {
  STD_TORCH_CHECK(residual == nullptr, "effkernels_cpu: program: this step has no residual");
}

void set_mean(PointwiseConvArgs& args, void* mean) { args.mean = mean; }
void set_mean(DepthwiseConvArgs& args, void* mean) { args.mean = mean; }
template <class Args>
void set_mean(Args&, void* mean) {
  STD_TORCH_CHECK(mean == nullptr, "effkernels_cpu: program: this step has no mean");
}

class Program {
 public:
  Program(const std::vector<int64_t>& values, const std::vector<int64_t>& steps,
          std::vector<Tensor> weights, bool bf16)
      : weights_(std::move(weights)), dtype_(bf16 ? DType::bf16 : DType::f32) {
    STD_TORCH_CHECK(values.size() % 4 == 0 && steps.size() % kStepNumbers == 0,
                    "effkernels_cpu: program: incomplete values or steps");
    for (size_t i = 0; i < values.size(); i += 4) {
      values_.push_back({values[i], values[i + 1], values[i + 2], values[i + 3]});
      const Value& value = values_.back();
      STD_TORCH_CHECK(value.height >= 0 && value.width >= 0 && value.channels >= 0,
                      "effkernels_cpu: program: negative size");
      if (value.place >= 0) {
        arena_ = max_of(arena_, value.place + value.size());
      } else {
        tensors_ = max_of(tensors_, -value.place);
      }
    }
    for (size_t i = 0; i < steps.size(); i += kStepNumbers) steps_.push_back(step(&steps[i]));
  }

  void run(const std::vector<Tensor>& tensors) const {
    STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == tensors_,
                    "effkernels_cpu: program: another number of tensors");
    const int64_t count = tensors_ == 0 ? 0 : tensors[0].size(0);
    for (const Value& value : values_) {
      if (value.place >= 0) continue;
      const Tensor& tensor = tensors[static_cast<size_t>(-1 - value.place)];
      STD_TORCH_CHECK(dtype_of(tensor) == dtype_, "effkernels_cpu: program: another dtype");
      check_size("program's tensor", tensor, count * value.size());
    }
    const int64_t size = size_of(dtype_);
    char* arena = reinterpret_cast<char*>(
        scratch(ScratchUse::kProgram, static_cast<size_t>(ceil_div(count * arena_ * size, 4))));
    const auto data = [&](int64_t index) -> void* {
      if (index < 0) return nullptr;
      const Value& value = values_[static_cast<size_t>(index)];
      if (value.place >= 0) return arena + value.place * count * size;
      return tensors[static_cast<size_t>(-1 - value.place)].mutable_data_ptr();
    };
    const Parallel parallel = torch_threads();
    for (const Step& step : steps_) {
      const Value& input = values_[static_cast<size_t>(step.input)];
      std::visit(
          [&](auto args) {  // a copy: another thread may run this program, too
            args.dtype = dtype_;
            args.input = data(step.input);
            args.output = data(step.output);
            args.parallel = parallel;
            set_residual(args, data(step.residual));
            set_mean(args, data(step.mean));
            if constexpr (std::is_same_v<decltype(args), SiluArgs>) {
              args.size = count * input.size();
            } else {
              args.in = input.images(count);
            }
            call(args);
          },
          step.args);
    }
  }

 private:
  const Value& value(int64_t index) const {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(values_.size()),
                    "effkernels_cpu: program: no value ", index);
    return values_[static_cast<size_t>(index)];
  }

  static void check_same(const Value& a, const Value& b) {
    STD_TORCH_CHECK(a.height == b.height && a.width == b.width && a.channels == b.channels,
                    "effkernels_cpu: program: two values differ in size");
  }

  Step step(const int64_t* numbers) const {
    Step result{};
    result.input = numbers[1];
    result.residual = numbers[2];
    result.output = numbers[3];
    result.mean = numbers[4];
    const Value &in = value(result.input), &out = value(result.output);
    if (result.residual >= 0) check_same(value(result.residual), out);
    if (result.mean >= 0) check_same(value(result.mean), {1, 1, out.channels, 0});

    const auto weight = [&](size_t i) -> OptionalTensor {
      const int64_t index = numbers[kWeightsAt + i];
      STD_TORCH_CHECK(index < static_cast<int64_t>(weights_.size()),
                      "effkernels_cpu: program: no weight ", index);
      return index < 0 ? OptionalTensor{} : OptionalTensor{weights_[static_cast<size_t>(index)]};
    };
    const auto required = [&](size_t i) {
      const OptionalTensor tensor = weight(i);
      STD_TORCH_CHECK(tensor.has_value(), "effkernels_cpu: program: a weight is missing");
      return *tensor;
    };
    const auto activation = [&](size_t i) { return numbers[kActivationsAt + i]; };
    const auto geometry = [&] {
      return geometry_of({numbers + kGeometryAt, numbers + kActivationsAt});
    };

    switch (numbers[0]) {
      case kConv: {
        ConvArgs args{};
        args.planar = numbers[kPlanarAt] != 0;
        args.geometry = geometry();
        args.in = in.images(0);
        args.out_height = out.height;
        args.out_width = out.width;
        args.out_channels = out.channels;
        set_weights(args, required(0), weight(3));
        args.epilogue = epilogue_of(weight(1), weight(2), out.channels, activation(0));
        result.args = args;
        break;
      }
      case kPointwiseConv: {
        check_same({in.height, in.width, out.channels, 0}, out);
        PointwiseConvArgs args{};
        args.out_channels = out.channels;
        args.weight = floats("weight", required(0), panels_size(out.channels, in.channels));
        args.epilogue = epilogue_of(weight(1), weight(2), out.channels, activation(0));
        result.args = args;
        break;
      }
      case kDepthwiseConv: {
        STD_TORCH_CHECK(in.channels == out.channels, "effkernels_cpu: program: channels differ");
        DepthwiseConvArgs args{};
        args.geometry = geometry();
        args.out_height = out.height;
        args.out_width = out.width;
        args.weight = taps_of(required(0), args.geometry, in.channels);
        args.epilogue = epilogue_of(weight(1), weight(2), out.channels, activation(0));
        result.args = args;
        break;
      }
      case kMBConv:
        result.args = block(in, out, geometry(), numbers, weight);
        break;
      case kSqueezeExcite: {
        check_same(in, out);
        SqueezeExciteArgs args{};
        args.weights = gate_of(required(0), weight(1), required(2), weight(3), in.channels,
                               activation(0), activation(1));
        result.args = args;
        break;
      }
      case kSilu: {
        check_same(in, out);
        SiluArgs args{};
        args.activation = activation_of(activation(0));
        result.args = args;
        break;
      }
      case kBatchNormAct: {
        check_same(in, out);
        BatchNormActArgs args{};
        // Read only: they are written in training.
        args.mean = const_cast<float*>(floats("mean", required(0), in.channels));
        args.var = const_cast<float*>(floats("var", required(1), in.channels));
        args.weight = floats("weight", weight(2), in.channels);
        args.bias = floats("bias", weight(3), in.channels);
        args.activation = activation_of(activation(0));
        result.args = args;
        break;
      }
      case kCopy: {
        check_same({in.height, in.width, out.channels, 0}, out);
        const int64_t* channels = numbers + kGeometryAt;
        CopyArgs args{};
        args.out_channels = out.channels;
        args.from = channels[0];
        args.to = channels[1];
        args.count = channels[2];
        const bool fits = args.from >= 0 && args.to >= 0 && args.count >= 0 &&
                          args.count <= in.channels - args.from &&
                          args.count <= out.channels - args.to;
        STD_TORCH_CHECK(fits, "effkernels_cpu: program: no such channels");
        result.args = args;
        break;
      }
      default:
        STD_TORCH_CHECK(false, "effkernels_cpu: program: unknown step");
    }
    return result;
  }

  template <class Weight>
  static MBConvArgs block(const Value& in, const Value& out, const Geometry& geometry,
                          const int64_t* numbers, const Weight& weight) {
    const int64_t* activations = numbers + kActivationsAt;
    MBConvArgs args{};
    args.out_height = out.height;
    args.out_width = out.width;
    args.out_channels = out.channels;
    args.geometry = geometry;
    const OptionalTensor expand = weight(0), depthwise = weight(3), reduce = weight(6);
    const OptionalTensor widen = weight(8), project = weight(10);
    STD_TORCH_CHECK(depthwise && project, "effkernels_cpu: program: a weight is missing");
    args.expanded = project->size(1);
    STD_TORCH_CHECK(expand || args.expanded == in.channels,
                    "effkernels_cpu: program: project_weight is for ", args.expanded, " channels");
    args.expand_weight = floats("expand_weight", expand, panels_size(args.expanded, in.channels));
    args.expand = epilogue_of(weight(1), weight(2), args.expanded, activations[0]);
    args.depthwise_weight = taps_of(*depthwise, geometry, args.expanded);
    args.depthwise = epilogue_of(weight(4), weight(5), args.expanded, activations[0]);
    args.squeeze_excite = reduce && widen;
    if (args.squeeze_excite) {
      args.gate = gate_of(*reduce, weight(7), *widen, weight(9), args.expanded, activations[1],
                          activations[2]);
    }
    args.project_weight =
        floats("project_weight", *project, panels_size(out.channels, args.expanded));
    args.project = epilogue_of(weight(11), weight(12), out.channels, activations[3]);
    return args;
  }

  std::vector<Tensor> weights_;  // steps point into them
  DType dtype_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t arena_ = 0;    // values per image
  int64_t tensors_ = 0;  // that a run is given
};

// The stable ABI has no classes of its own, so programs go by number.
std::mutex programs_mutex;
int64_t last_handle = 0;
std::unordered_map<int64_t, std::shared_ptr<const Program>>& programs() {
  static auto* all = new std::unordered_map<int64_t, std::shared_ptr<const Program>>();
  return *all;  // never destroyed: its tensors must not outlive PyTorch
}

}  // namespace

int64_t program_create(std::vector<int64_t> values, std::vector<int64_t> steps,
                       std::vector<Tensor> weights, bool bf16) {
  auto program = std::make_shared<const Program>(values, steps, std::move(weights), bf16);
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs()[++last_handle] = std::move(program);
  return last_handle;
}

void program_run(int64_t handle, std::vector<Tensor> tensors) {
  std::shared_ptr<const Program> program;
  {
    const std::lock_guard<std::mutex> lock(programs_mutex);
    const auto found = programs().find(handle);
    STD_TORCH_CHECK(found != programs().end(), "effkernels_cpu: no program ", handle);
    program = found->second;
  }
  program->run(tensors);
}

void program_free(int64_t handle) {
  const std::lock_guard<std::mutex> lock(programs_mutex);
  programs().erase(handle);
}

}  // namespace effkernels
