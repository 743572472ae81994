// The instruction sets compiled in and usable here.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fmm::cpu {

// Best first; never empty.
std::vector<const Kernels*> available();

}  // namespace fmm::cpu
