__global__ void k(int* p) { p[threadIdx.x] = threadIdx.x * 3; }
extern "C" int go() {
  int* d;
  cudaMalloc(&d, 128);
  k<<<1, 32>>>(d);
  int h[32];
  cudaError_t e = cudaMemcpy(h, d, 128, cudaMemcpyDeviceToHost);
  cudaFree(d);
  return e ? -(int)e : h[31];
}
