#pragma once

#include "mbconv/mbconv.h"

namespace effkernels {

// An mbconv without expansion and gate.
EFFKERNELS_OP(depthwise_separable_conv, MBConvArgs)

}  // namespace effkernels
