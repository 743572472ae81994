// Small dense kernels for the tensor-core models: D += s * (A * B), fp32.
// Products of f16/bf16/tf32/fp8 values are exact in fp32, so mul+add equals fma here.
#pragma once
namespace vsim {
typedef float v8f __attribute__((vector_size(32), aligned(4), may_alias));
// rows multiple of 4, n multiple of 8
static inline void gemm_rows(const float* A, int lda, const float* B, int ldb, float* D, int ldd,
                             int rows, int n, int K, float s) {
  for (int c = 0; c < n; c += 8)
    for (int r = 0; r < rows; r += 4) {
      v8f a0 = {}, a1 = {}, a2 = {}, a3 = {};
      const float *p0 = A + r * lda, *p1 = p0 + lda, *p2 = p1 + lda, *p3 = p2 + lda, *b = B + c;
      for (int k = 0; k < K; k++, b += ldb) {
        v8f v = *(const v8f*)b;
        a0 += p0[k] * v;
        a1 += p1[k] * v;
        a2 += p2[k] * v;
        a3 += p3[k] * v;
      }
      float* d = D + r * ldd + c;
      *(v8f*)d += s * a0;
      *(v8f*)(d + ldd) += s * a1;
      *(v8f*)(d + 2 * ldd) += s * a2;
      *(v8f*)(d + 3 * ldd) += s * a3;
    }
}
}  // namespace vsim
