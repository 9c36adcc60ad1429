// depthwise_separable_conv: output = project(pointwise_weight * depthwise(depthwise_weight (*)
// input))
//
// The block of mbconv/cpu.cpp without expansion and gate: the depthwise result of one image stays
// in its scratch. Moves input, output and that scratch once.
#include "depthwise_separable_conv/depthwise_separable_conv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

void depthwise_separable_conv(const MBConvArgs& args) { mbconv(args); }

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
