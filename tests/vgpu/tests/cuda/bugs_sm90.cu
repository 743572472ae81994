extern "C" __global__ void alu(float* o, int n) {
  float a = threadIdx.x, b = 1.0001f;
  unsigned h = threadIdx.x;
  for (int i = 0; i < n; i++) {
    a = a * b + 0.5f;
    h = (h ^ (h >> 3)) * 2654435761u + i;
    b += (h & 1) ? 1e-6f : -1e-6f;
  }
  o[threadIdx.x] = a + h;
}
