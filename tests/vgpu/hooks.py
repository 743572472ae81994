"""What site/sitecustomize.py applies to torch and Triton right after their import."""

import ctypes

from . import launch_count, launches, library


def after_torch(torch) -> None:
    lib = ctypes.CDLL(str(library("libvgpu_aten.so")))
    if not lib.vgpu_aten_install():
        raise RuntimeError("vgpu: no aten operator was overridden")
    torch.cuda._lazy_call(lib.vgpu_aten_attach)  # sees every block from the first allocation on
    torch.backends.cudnn.enabled = False

    import torch.cuda._utils as cu

    get = cu._get_gpu_rtc_library

    def rtc():  # NVRTC: hand over PTX where a cubin is asked for
        r = get()
        r.nvrtcGetCUBINSize, r.nvrtcGetCUBIN = r.nvrtcGetPTXSize, r.nvrtcGetPTX
        return r

    cu._get_gpu_rtc_library = rtc

    def capture_begin(self, *a, **k):
        raise RuntimeError("vgpu: CUDA graphs are not supported on the virtual device")

    torch.cuda.CUDAGraph.capture_begin = capture_begin


def after_triton_backend(mod) -> None:
    """Cubins carry their PTX behind the ELF image, for loaders other than Triton's own."""
    backend = mod.CUDABackend
    old = backend.make_cubin

    def make_cubin(self, src, *a, **k):
        ptx = src.encode() if isinstance(src, str) else src
        return old(self, src, *a, **k) + b"\nVGPU-PTX\n" + ptx + b"\0"

    backend.make_cubin = make_cubin


def _cost(fn) -> float:
    """A benchmark here: one run; its 'time' is its instructions, 1e6 warp instructions = 1 ms."""
    n = launch_count()
    fn()
    return sum(r["counters"].get("warp_insts", 0) for r in launches(n)) / 1e6


def after_triton_driver(mod) -> None:
    def bench(fn, *a, quantiles=None, **k):
        ms = _cost(fn)
        return ms if quantiles is None else [ms] * len(quantiles)

    mod.CudaDriver.get_benchmarker = lambda self: bench


def after_inductor_benchmarking(mod) -> None:
    for c in vars(mod).values():
        if isinstance(c, type) and "benchmark_gpu" in vars(c):
            c.benchmark_gpu = lambda self, fn, *a, **k: _cost(fn)


def after_triton_compiler(mod) -> None:
    """The binary that Triton loads becomes the PTX; its launcher and argument packing stay."""
    kernel = mod.CompiledKernel
    old = kernel._init_handles

    def _init_handles(self):
        if self.module is None and "ptx" in self.asm:
            p = self.asm["ptx"]
            self.kernel = p.encode() if isinstance(p, str) else p
        return old(self)

    kernel._init_handles = _init_handles


AFTER = {
    "torch": after_torch,
    "triton.backends.nvidia.compiler": after_triton_backend,
    "triton.backends.nvidia.driver": after_triton_driver,
    "triton.compiler.compiler": after_triton_compiler,
    "torch._inductor.runtime.benchmarking": after_inductor_benchmarking,
}
