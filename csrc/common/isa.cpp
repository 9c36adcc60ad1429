#include "common/isa.h"

#include <atomic>

#include "common/isa_select.h"

namespace effkernels {
namespace {

struct Named {
  const char* name;
  Isa isa;
};

// Slowest first.
constexpr Named kCompiled[] = {
    {"portable", Isa::portable},
#if defined(__x86_64__)
    {"avx2", Isa::avx2},
    {"avx512", Isa::avx512},
#elif defined(__aarch64__)
    {"neon", Isa::neon},
#endif
};

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512) return __builtin_cpu_supports("avx512f") && supported(Isa::avx2);
#endif
  (void)isa;
  return true;  // portable; NEON is part of every aarch64
}

Isa best() {
  Isa result = Isa::portable;
  for (const Named& entry : kCompiled) {
    if (supported(entry.isa)) result = entry.isa;
  }
  return result;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

std::string isa_name() {
  for (const Named& entry : kCompiled) {
    if (entry.isa == current_isa()) return entry.name;
  }
  return "portable";
}

std::string isa_names() {
  std::string names;
  for (const Named& entry : kCompiled) {
    if (!supported(entry.isa)) continue;
    if (!names.empty()) names += ' ';
    names += entry.name;
  }
  return names;
}

bool choose_isa(const std::string& name) {
  for (const Named& entry : kCompiled) {
    if (name == entry.name && supported(entry.isa)) {
      chosen().store(entry.isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace effkernels
