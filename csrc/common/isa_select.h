// Asking for and choosing the instruction set, for the bindings.
#pragma once

#include <string>

namespace effkernels {

std::string isa_name();                    // the one in use
std::string isa_names();                   // those that can be chosen, slowest first
bool choose_isa(const std::string& name);  // false: not compiled or not on this CPU

}  // namespace effkernels
