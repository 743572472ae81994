// The CPU kernels' entry points: declared once per instruction set, and as a table of pointers.
#pragma once

#include "../bi_attention.h"
#include "../co_attention.h"
#include "../pair_loss.h"

#define FMM_CPU_KERNELS(X)                                                         \
  X(bi_attention_fwd, (const BiAttention&, ParallelFor))                           \
  X(bi_attention_bwd, (const BiAttention&, const BiAttentionGrad&, ParallelFor))   \
  X(co_attention_fwd, (const CoAttention&, ParallelFor))                           \
  X(co_attention_bwd, (const CoAttention&, const CoAttentionGrad&, ParallelFor))   \
  X(contrastive_loss_fwd, (const PairLoss&, const ContrastiveStats&, ParallelFor)) \
  X(contrastive_loss_bwd, (const PairLoss&, const ContrastiveGrad&, ParallelFor))  \
  X(sigmoid_loss_fwd, (const PairLoss&, const SigmoidTerms&, ParallelFor))         \
  X(sigmoid_loss_bwd, (const PairLoss&, const SigmoidGrad&, ParallelFor))          \
  X(fma_chains, (int64_t rounds, bool bf16, double* flop))

namespace fmm::cpu {

struct Kernels {
  const char* isa;
#define FMM_MEMBER(name, args) void(*name) args;
  FMM_CPU_KERNELS(FMM_MEMBER)
#undef FMM_MEMBER
};

// The kernels in use: the best instruction set of this machine, or what FUSEDMM_CPU_ISA names.
const Kernels& kernels();

#if defined(FMM_ISA)
namespace FMM_ISA {
#define FMM_DECLARE(name, args) void name args;
FMM_CPU_KERNELS(FMM_DECLARE)
#undef FMM_DECLARE
}  // namespace FMM_ISA
#endif

}  // namespace fmm::cpu
