// Calling an op in every instruction set that this CPU has, and judging what it wrote.
#pragma once

#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "batch_norm_act/batch_norm_act.h"
#include "conv/conv.h"
#include "depthwise_conv/depthwise_conv.h"
#include "depthwise_separable_conv/depthwise_separable_conv.h"
#include "mbconv/mbconv.h"
#include "mbconv_training/mbconv_training.h"
#include "pointwise_conv/pointwise_conv.h"
#include "reference.h"
#include "silu/silu.h"
#include "squeeze_excite/squeeze_excite.h"

namespace reference {

struct Kernels {
  const char* isa;
  bool supported;
  void (*depthwise_conv)(const DepthwiseConvArgs&);
  void (*depthwise_conv_backward)(const DepthwiseConvBackwardArgs&);
  void (*pointwise_conv)(const PointwiseConvArgs&);
  void (*conv)(const ConvArgs&);
  void (*squeeze_excite_gate)(const SqueezeExciteGateArgs&);
  void (*squeeze_excite)(const SqueezeExciteArgs&);
  void (*squeeze_excite_gate_backward)(const SqueezeExciteGateBackwardArgs&);
  void (*squeeze_excite_backward)(const SqueezeExciteBackwardArgs&);
  void (*silu)(const SiluArgs&);
  void (*silu_backward)(const SiluBackwardArgs&);
  void (*batch_norm_act)(const BatchNormActArgs&);
  void (*batch_norm_act_backward)(const BatchNormActBackwardArgs&);
  void (*depthwise_separable_conv)(const MBConvArgs&);
  void (*mbconv)(const MBConvArgs&);
  void (*mbconv_training_product)(const TrainingProductArgs&);
  void (*mbconv_training_depthwise)(const TrainingDepthwiseArgs&);
  void (*mbconv_training_pool)(const TrainingPoolArgs&);
  void (*mbconv_training_finish)(const TrainingFinishArgs&);
  void (*mbconv_training_norm_backward)(const TrainingNormBackwardArgs&);
  void (*mbconv_training_product_backward)(const TrainingProductBackwardArgs&);
  void (*mbconv_training_depthwise_backward)(const TrainingDepthwiseBackwardArgs&);
};

#define KERNELS(isa, supported)           \
  {#isa,                                  \
   supported,                             \
   isa::depthwise_conv,                   \
   isa::depthwise_conv_backward,          \
   isa::pointwise_conv,                   \
   isa::conv,                             \
   isa::squeeze_excite_gate,              \
   isa::squeeze_excite,                   \
   isa::squeeze_excite_gate_backward,     \
   isa::squeeze_excite_backward,          \
   isa::silu,                             \
   isa::silu_backward,                    \
   isa::batch_norm_act,                   \
   isa::batch_norm_act_backward,          \
   isa::depthwise_separable_conv,         \
   isa::mbconv,                           \
   isa::mbconv_training_product,          \
   isa::mbconv_training_depthwise,        \
   isa::mbconv_training_pool,             \
   isa::mbconv_training_finish,           \
   isa::mbconv_training_norm_backward,    \
   isa::mbconv_training_product_backward, \
   isa::mbconv_training_depthwise_backward}

inline const Kernels kKernels[] = {
    KERNELS(portable, true),
#if defined(__x86_64__)
    KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
    KERNELS(avx512, __builtin_cpu_supports("avx512f") != 0),
#elif defined(__aarch64__)
    KERNELS(neon, true),
#endif
};
#undef KERNELS

struct Tally {
  int cases = 0, failures = 0;
  double worst = 0.0;  // float32 error as a share of what is allowed
};
inline std::map<std::pair<std::string, std::string>, Tally> tallies;

struct Expected {
  Tensor* actual;
  const Values& values;
  double relative, absolute;  // error allowed before the result is stored
};

// A sum of `depth` terms of size 1 or so, and what follows it.
inline Expected sums(Tensor& actual, const Values& values, int64_t depth) {
  const double error = 5e-7 * std::sqrt(static_cast<double>(depth));
  return {&actual, values, error, error};
}

// The first difference in words, empty if there is none.
inline std::string difference(const Expected& expected, Tally& tally) {
  const Tensor& actual = *expected.actual;
  for (int64_t i = 0; i < actual.size(); i++) {
    const double got = actual[i], want = expected.values[i];
    const double allowed = expected.relative * std::fabs(want) + expected.absolute;
    bool right = std::isnan(want) ? std::isnan(got) : got == want;
    if (!right && std::isfinite(want)) {
      right = got >= stored(actual.dtype(), want - allowed) &&
              got <= stored(actual.dtype(), want + allowed);
      if (actual.dtype() == DType::f32) {
        tally.worst = std::max(tally.worst, std::fabs(got - want) / allowed);
      }
    }
    if (right) continue;
    char text[160];
    std::snprintf(text, sizeof text, "value %lld of %lld is %.9g, not %.9g +- %.2g",
                  static_cast<long long>(i), static_cast<long long>(actual.size()), got, want,
                  allowed);
    return text;
  }
  return actual.margins_intact() ? "" : "memory beside the result was written";
}

inline void in_reverse(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int64_t part = 2; part >= 0; part--) {
    const int64_t begin = part * tasks / 3, end = (part + 1) * tasks / 3;
    if (begin < end) body(context, begin, end);
  }
}

template <class Args>
void verify(const char* op, void (*Kernels::*kernel)(const Args&), Args args,
            const std::vector<Expected>& outputs, const std::string& what) {
  for (const Kernels& kernels : kKernels) {
    if (!kernels.supported) continue;
    const FlushDenormals flush;  // as around every op (common/isa.h)
    Tally& tally = tallies[{kernels.isa, op}];
    std::string problem;
    std::vector<Tensor> alone;
    for (const Expected& output : outputs) output.actual->clear();
    args.parallel = {1, nullptr};
    (kernels.*kernel)(args);
    for (const Expected& output : outputs) {
      if (problem.empty()) problem = difference(output, tally);
      alone.push_back(*output.actual);
      output.actual->clear();
    }
    args.parallel = {3, in_reverse};
    (kernels.*kernel)(args);
    for (size_t i = 0; i < outputs.size(); i++) {
      if (problem.empty() && !(*outputs[i].actual == alone[i])) {
        problem = "three threads give another result than one";
      }
    }
    tally.cases++;
    if (!problem.empty() && tally.failures++ == 0) {
      std::printf("%s %s, %s: %s\n", kernels.isa, op, what.c_str(), problem.c_str());
    }
  }
}

inline std::string describe(DType dtype, const Images& in, const Window& w, int64_t out_channels) {
  char text[160];
  std::snprintf(text, sizeof text, "%s %dx%dx%dx%d -> %d channels, k%d s%d d%d",
                dtype == DType::f32 ? "f32" : "bf16", int(in.count), int(in.height), int(in.width),
                int(in.channels), int(out_channels), int(w.kernel), int(w.stride), int(w.dilation));
  return text;
}

}  // namespace reference
