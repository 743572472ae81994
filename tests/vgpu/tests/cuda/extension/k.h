#pragma once
#include <cuda_runtime_api.h>
void run_saxpy(float a, const float* x, float* y, int n, int block, cudaStream_t s);
void run_saxpy_oob(float a, const float* x, float* y, int n, cudaStream_t s);
cudaError_t run_rowsum(const float* x, float* o, int rows, int n, int opt_in, bool sync,
                       cudaStream_t s);
void run_histogram(const int* x, int* h, float* w, int n, cudaStream_t s);
void run_hscale(void* x, float a, int n, cudaStream_t s);
int run_const(const float* tab, float* y, int n, cudaStream_t s);
void run_bug(int which, void* p, cudaStream_t s);
void attrs(int* out);
