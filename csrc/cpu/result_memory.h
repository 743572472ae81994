// Memory of results: a large one that is freed is kept for the next one of its size.
#pragma once

#include <ATen/core/Tensor.h>

namespace fmm::cpu {

// at::empty on the CPU. malloc maps and unmaps what is large, and every call then faults its
// results in anew, page by page, which costs as much as the products of a narrow attention. Of what
// was freed here 256 MiB are kept: the newest 64 stay as they are, the others are lent to the
// system, which takes them when it runs short.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace fmm::cpu
