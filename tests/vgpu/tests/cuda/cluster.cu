extern "C" __global__ void __cluster_dims__(2, 1, 1) c2(int* o) { o[threadIdx.x] = 1; }
