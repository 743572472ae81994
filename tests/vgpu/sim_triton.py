"""Compile Triton kernels for any sm_XX without a GPU and run them with sim.Module.

    r = run(jit_fn, grid=(16,), args=[a, b, c, M, N], constexprs={"BM": 64}, num_warps=4, arch=90)

Types and divisibility are derived as the JIT does; host-side TensorDescriptors are encoded here.
"""

import struct
from typing import Any

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .sim import Buffer, Module, Result, SimError, _host_range

_TORCH = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "uint32": "u32",
    "int64": "i64",
    "uint64": "u64",
    "bool": "i1",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}
# bytes of the element types as the device numbers them: u8 u16 u32 s32 u64 s64 f16 f32 ... bf16
_ELEMENT_BYTES = [1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4]
_ELEMENTS = {"u8": 0, "u16": 1, "u32": 2, "s32": 3, "f16": 6, "f32": 7, "f64": 9, "bf16": 10}


def encode_tiled(
    addr: int,
    dtype: str | int,
    dims: Any,
    strides: Any,
    box: Any,
    swizzle: int = 0,
    nan: bool = False,
) -> bytes:
    """A tensor map. Innermost first; strides: bytes of dims 1..; swizzle 0, 32, 64 or 128."""
    addr = getattr(addr, "addr", addr)  # also a Buffer
    rank = len(dims)
    kind = _ELEMENTS[dtype] if isinstance(dtype, str) else int(dtype)
    inner = box[0] * _ELEMENT_BYTES[kind]
    if not 1 <= rank <= 5 or len(box) != rank or len(strides) != rank - 1:
        raise SimError("tensor map: inconsistent ranks")
    if addr % 16 or any(s % 16 for s in strides):
        raise SimError("tensor map: address and strides must be multiples of 16 bytes")
    if any(not 1 <= b <= 256 for b in box) or inner % 16 or (swizzle and inner > swizzle):
        raise SimError(f"tensor map: box {box} of {inner} bytes does not fit swizzle {swizzle}")

    def pad(t: Any, v: int) -> list[int]:
        return [*t, *[v] * (5 - len(t))]

    mode = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    b = struct.pack("<QI8B", addr, 0x50414D54, kind, rank, 0, mode, int(nan), 0, 0, 0)
    b += struct.pack("<5I4x", *pad(dims, 0))
    b = b.ljust(-(-len(b) // 8) * 8, b"\0")
    b += struct.pack("<4Q5I5I", *pad(strides, 0)[:4], *pad(box, 0), *[1] * 5)
    return b.ljust(128, b"\0")


def _element(a: Any) -> str:
    return _TORCH[str((a.array if isinstance(a, Buffer) else a).dtype).removeprefix("torch.")]


class Kernel:
    """A compiled Triton kernel; replace `module` to run altered PTX."""

    def __init__(
        self, jit_fn: Any, args: dict, constexprs: dict, arch: int, **options: Any
    ) -> None:
        sig, attrs, cst = {}, {}, dict(constexprs)
        for i, n in enumerate(jit_fn.arg_names):
            v = args.get(n)
            divisible = False
            if n in cst or v is None or (v == 1 if isinstance(v, int) else False):
                sig[n] = "constexpr"
                cst.setdefault(n, v)
            elif hasattr(v, "block_shape"):
                block = ",".join(map(str, v.block_shape))
                sig[n] = f"tensordesc<{_element(v.base)}[{block}]>"
            elif isinstance(v, Buffer) or _host_range(v) is not None:
                sig[n] = "*" + _element(v)
                divisible = not isinstance(v, Buffer) or v.addr % 16 == 0
            elif isinstance(v, bool):
                sig[n] = "i1"
            elif isinstance(v, int | np.integer):
                sig[n] = "i32" if -(2**31) <= v < 2**31 else "i64"
                divisible = v % 16 == 0
            else:
                sig[n] = "fp32"
            if divisible:
                attrs[(i,)] = [["tt.divisibility", 16]]
        src = ASTSource(jit_fn, sig, constexprs=cst, attrs=attrs)
        k = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
        self.args, self.ptx, self.meta = (
            [n for n in sig if sig[n] != "constexpr"],
            k.asm["ptx"],
            k.metadata,
        )
        self.signature, self.module = sig, Module(self.ptx)

    def launch(self, grid: Any, args: dict, **kw: Any) -> Result:
        md, mod = self.meta, self.module
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        values, names, descriptors = [], [], iter(md.tensordesc_meta or [])
        keep = len(mod.device.buffers)
        for n in self.args:
            v, t = args[n], self.signature[n]
            if t.startswith("tensordesc"):
                meta = next(descriptors)
                base = mod.device.buffer(v.base, n)
                box, bytes_ = list(reversed(meta["block_size"])), meta["elem_size"]
                strides = [s * bytes_ for s in reversed(list(v.strides))][1:]
                swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
                nan = getattr(v, "padding", "zero") == "nan"
                dims = list(reversed(list(v.shape)))
                values.append(
                    encode_tiled(base.addr, meta["elem_type"], dims, strides, box, swizzle, nan)
                )
                values += [*v.shape, *v.strides]
                names += [n] * (1 + 2 * len(box))
                continue
            values.append({"fp32": np.float32}.get(t, lambda x: x)(v))
            names.append(n)
        k = mod.kernels[md.name]
        ctas = int(np.prod(grid))
        for size in (md.global_scratch_size, md.profile_scratch_size):  # trailing scratch pointers
            if len(values) < len(k["params"]):
                values.append(np.full(size * ctas, 0xA5, np.uint8) if size else None)
                names.append("scratch")
        block = k["reqntid"][0] or md.num_warps * 32
        try:
            return mod.launch(md.name, grid, block, values, md.shared, names=names, **kw)
        finally:
            del mod.device.buffers[keep:]


def named(jit_fn: Any, args: Any, constexprs: dict) -> dict:
    """Positional arguments of the parameters that are not constexpr, by name."""
    if isinstance(args, dict):
        return args
    return dict(zip([n for n in jit_fn.arg_names if n not in constexprs], args, strict=True))


def run(
    jit_fn: Any,
    grid: Any,
    args: Any,
    constexprs: dict | None = None,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    arch: int = 80,
    options: dict | None = None,
    **kw: Any,
) -> Result:
    """Compile and launch once; the result carries the Kernel as `.kernel`."""
    constexprs = constexprs or {}
    args = named(jit_fn, args, constexprs)
    opt = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    k = Kernel(jit_fn, args, constexprs, arch, **opt)
    r = k.launch(grid, args, **kw)
    r.kernel = k
    return r
