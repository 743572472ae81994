#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
using namespace nvcuda;
template <class T, class ACC, int M, int N, int K, class LA, class LB>
__device__ void body(const T* a, const T* b, ACC* c, int lda, int ldb, int ldc, int kk) {
  wmma::fragment<wmma::matrix_a, M, N, K, T, LA> fa;
  wmma::fragment<wmma::matrix_b, M, N, K, T, LB> fb;
  wmma::fragment<wmma::accumulator, M, N, K, ACC> fc;
  wmma::fill_fragment(fc, ACC(0));
  for (int k = 0; k < kk; k += K) {
    const T* pa = std::is_same<LA, wmma::row_major>::value ? a + k : a + k * lda;
    const T* pb = std::is_same<LB, wmma::row_major>::value ? b + k * ldb : b + k;
    wmma::load_matrix_sync(fa, pa, lda);
    wmma::load_matrix_sync(fb, pb, ldb);
    wmma::mma_sync(fc, fa, fb, fc);
  }
  for (int i = 0; i < fc.num_elements; i++) fc.x[i] = fc.x[i] * ACC(2);
  wmma::store_matrix_sync(c, fc, ldc, wmma::mem_row_major);
}
using R = wmma::row_major;
using C = wmma::col_major;
extern "C" __global__ void w_h16(const half* a, const half* b, float* c, int k) {
  body<half, float, 16, 16, 16, R, R>(a, b, c, k, 16, 16, k);
}
extern "C" __global__ void w_h16cc(const half* a, const half* b, float* c, int k) {
  body<half, float, 16, 16, 16, C, C>(a, b, c, 16, k, 16, k);
}
extern "C" __global__ void w_h32x8(const half* a, const half* b, float* c, int k) {
  body<half, float, 32, 8, 16, R, R>(a, b, c, k, 8, 8, k);
}
extern "C" __global__ void w_h8x32(const half* a, const half* b, half* c, int k) {
  body<half, half, 8, 32, 16, R, C>(a, b, c, k, k, 32, k);
}
extern "C" __global__ void w_bf(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k) {
  body<__nv_bfloat16, float, 16, 16, 16, R, C>(a, b, c, k, k, 16, k);
}
extern "C" __global__ void w_s8(const signed char* a, const signed char* b, int* c, int k) {
  body<signed char, int, 16, 16, 16, R, C>(a, b, c, k, k, 16, k);
}
extern "C" __global__ void w_f64(const double* a, const double* b, double* c, int k) {
  body<double, double, 8, 8, 4, R, C>(a, b, c, k, k, 8, k);
}
extern "C" __global__ void w_smem(const half* a, const half* b, float* c) {
  __shared__ half sa[16 * 24], sb[16 * 24];
  __shared__ float sc[256];
  for (int i = threadIdx.x; i < 256; i += 32) {
    sa[(i / 16) * 24 + i % 16] = a[i];
    sb[(i / 16) * 24 + i % 16] = b[i];
  }
  __syncwarp();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, R> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, R> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 0.f);
  wmma::load_matrix_sync(fa, sa, 24);
  wmma::load_matrix_sync(fb, sb, 24);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(sc, fc, 16, wmma::mem_row_major);
  __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) c[i] = sc[i];
}
extern "C" __global__ void w_tf32(const float* a, const float* b, float* c, int k) {
  wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, R> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, C> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> fc;
  wmma::fill_fragment(fc, 0.f);
  for (int q = 0; q < k; q += 8) {
    wmma::load_matrix_sync(fa, a + q, k);
    wmma::load_matrix_sync(fb, b + q, k);
    for (int i = 0; i < fa.num_elements; i++) fa.x[i] = wmma::__float_to_tf32(fa.x[i]);
    for (int i = 0; i < fb.num_elements; i++) fb.x[i] = wmma::__float_to_tf32(fb.x[i]);
    wmma::mma_sync(fc, fa, fb, fc);
  }
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}
