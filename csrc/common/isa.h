// Instruction sets: which are compiled on this machine's kind, and which one is in use.
//
// Every csrc/<op>/cpu.cpp is compiled once per instruction set with -DEFFKERNELS_ISA=<name> and
// that set's flags, and defines its op in namespace effkernels::<name>. A file compiled for an
// instruction set must not use inline functions of the C++ library: the linker keeps one copy of
// each, perhaps the one with instructions that this CPU does not have.
#pragma once

#include "common/types.h"

#define EFFKERNELS_ID_portable 0
#define EFFKERNELS_ID_avx2 1
#define EFFKERNELS_ID_avx512 2
#define EFFKERNELS_ID_neon 3
#define EFFKERNELS_CONCAT_(a, b) a##b
#define EFFKERNELS_CONCAT(a, b) EFFKERNELS_CONCAT_(a, b)
#ifdef EFFKERNELS_ISA
#define EFFKERNELS_ISA_ID EFFKERNELS_CONCAT(EFFKERNELS_ID_, EFFKERNELS_ISA)
#endif

namespace effkernels {

enum class Isa { portable, avx2, avx512, neon };

Isa current_isa();

}  // namespace effkernels

// Declares an op in every compiled instruction set's namespace, and the function that calls the
// one in use.
#define EFFKERNELS_DECLARE(isa, op, Args) \
  namespace isa {                         \
  void op(const Args&);                   \
  }
#if defined(__x86_64__)
#define EFFKERNELS_OP(op, Args)            \
  EFFKERNELS_DECLARE(portable, op, Args)   \
  EFFKERNELS_DECLARE(avx2, op, Args)       \
  EFFKERNELS_DECLARE(avx512, op, Args)     \
  inline void op##_cpu(const Args& args) { \
    const FlushDenormals flush;            \
    switch (current_isa()) {               \
      case Isa::avx512:                    \
        return avx512::op(args);           \
      case Isa::avx2:                      \
        return avx2::op(args);             \
      default:                             \
        return portable::op(args);         \
    }                                      \
  }
#elif defined(__aarch64__)
#define EFFKERNELS_OP(op, Args)            \
  EFFKERNELS_DECLARE(portable, op, Args)   \
  EFFKERNELS_DECLARE(neon, op, Args)       \
  inline void op##_cpu(const Args& args) { \
    const FlushDenormals flush;            \
    switch (current_isa()) {               \
      case Isa::neon:                      \
        return neon::op(args);             \
      default:                             \
        return portable::op(args);         \
    }                                      \
  }
#else
#define EFFKERNELS_OP(op, Args)            \
  EFFKERNELS_DECLARE(portable, op, Args)   \
  inline void op##_cpu(const Args& args) { \
    const FlushDenormals flush;            \
    portable::op(args);                    \
  }
#endif
