"""The simulator without a CUDA runtime: run one kernel of some PTX on numpy or CPU torch arrays.

    m = Module.from_cuda("k.cu", arch="sm_80")          # or Module(ptx_text)
    r = m.launch("saxpy", grid=8, block=256, args=[x, y, 2.0, n], seed=0)
    r.stats["warp_insts"], r.unwritten(1), r.printf

Arrays are used in place; each is one allocation of exactly its bytes with a gap on either side.
"""

import ctypes
import functools
import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import active, build, library

VERSION = 1  # VSIM_VERSION
CHECKS = {"race": 1, "init": 2, "lanes": 4}
GAP = 1 << 16
U32x3 = ctypes.c_uint32 * 3


class SimError(RuntimeError):
    """A fault: what the text says; kind as in vsim.h ("race", "address", ...), line of the PTX."""

    def __init__(self, text: str, kind: str = "invalid", line: int = 0) -> None:
        super().__init__(text)
        self.kind, self.line = kind, line


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("text", ctypes.c_char_p),
        ("line", ctypes.c_uint32),
        ("has_thread", ctypes.c_int),
        ("has_address", ctypes.c_int),
        ("cta", U32x3),
        ("thread", U32x3),
        ("address", ctypes.c_uint64),
    ]


class _Range(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        ("map", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("readonly", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", U32x3),
        ("block", U32x3),
        ("cluster", U32x3),
        ("smem", ctypes.c_uint32),
        ("checks", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("max_insts", ctypes.c_uint64),
        ("params", ctypes.c_char_p),
        ("ranges", ctypes.POINTER(_Range)),
        ("param_bytes", ctypes.c_uint32),
        ("num_ranges", ctypes.c_uint32),
    ]


_Place = ctypes.CFUNCTYPE(
    ctypes.c_uint64,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)
_fn = ctypes.CFUNCTYPE


class _Api(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("load", _fn(ctypes.c_void_p, ctypes.c_char_p, _Place, ctypes.c_void_p)),
        ("unload", _fn(None, ctypes.c_void_p)),
        ("kernels", _fn(ctypes.c_char_p, ctypes.c_void_p)),
        ("decode", _fn(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)),
        ("launch", _fn(ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(_Launch))),
        ("fault", _fn(ctypes.POINTER(_Fault))),
        ("tensor_map", ctypes.c_void_p),
    ]


@functools.cache
def _api() -> _Api:
    where = library("") if active() else build.libraries()
    lib = ctypes.CDLL(str(where / "libvgpu_sim.so"))
    lib.vsim_get.restype = ctypes.POINTER(_Api)
    return lib.vsim_get(VERSION).contents


def _error() -> SimError:
    f = _api().fault().contents
    return SimError(f.text.decode(errors="replace"), f.name.decode(), f.line)


def _host_range(x: Any) -> tuple[int, int] | None:
    """(pointer, bytes spanned) of a numpy array or CPU torch tensor, else None."""
    if isinstance(x, np.ndarray):
        if any(s < 0 for s in x.strides):
            raise ValueError("negative strides are not supported")
        span = sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
        return x.ctypes.data, span + x.itemsize if x.size else 0
    if type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr"):
        if x.device.type != "cpu":
            raise ValueError("only CPU tensors")
        span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), (span + 1) * x.element_size() if x.numel() else 0
    return None


class Buffer:
    """A device allocation over a host array; `addr` is its simulated address."""

    def __init__(
        self, dev: "Device", array: Any, name: str, misalign: int = 0, readonly: bool = False
    ) -> None:
        self.host, self.nbytes = _host_range(array)
        self.array, self.name, self.readonly = array, name, readonly
        self.addr = -(-dev.next // 256) * 256 + misalign
        self.map = np.zeros(self.nbytes + 8, np.uint8)
        dev.next = self.addr + self.nbytes + GAP
        dev.buffers.append(self)

    def shadow(self) -> np.ndarray:
        """Per byte: 1 read, 2 written since the launch began."""
        return self.map[: self.nbytes].copy()

    def coverage(self) -> dict[str, int]:
        m = self.map[: self.nbytes]
        read, written = int((m & 1).sum()), int((m >> 1).sum())
        return {
            "bytes": self.nbytes,
            "read": read,
            "written": written,
            "touched": int((m != 0).sum()),
            "unwritten": self.nbytes - written,
        }


class Device:
    """The simulated global address space."""

    def __init__(self) -> None:
        self.next = 0x7F0000000000
        self.buffers: list[Buffer] = []

    def buffer(self, array: Any, name: str = "", misalign: int = 0) -> Buffer:
        return Buffer(self, array, name, misalign)

    def ranges(self) -> ctypes.Array:
        r = [
            _Range(b.addr, b.nbytes, b.host, b.map.ctypes.data, b.name.encode(), b.readonly)
            for b in self.buffers
        ]
        return (_Range * len(r))(*r)


def poison(x: Any, byte: int = 0xFF) -> Any:
    """Fill an output with all-ones bytes, NaN for every float type, so that missing writes show."""
    ctypes.memset(*(_host_range(x)[0], byte, _host_range(x)[1]))
    return x


class Result:
    """Counters of a launch, and what it read and wrote of each pointer argument."""

    def __init__(self, stats: dict[str, Any], buffers: dict[int, dict[str, int]]) -> None:
        self.stats, self.buffers, self.printf = stats, buffers, stats["printf"]
        stats["buffers"] = buffers

    def unwritten(self, i: int) -> int:
        """Bytes of pointer argument i that the launch never wrote."""
        return self.buffers[i]["unwritten"]


def _pack(value: Any, p: dict[str, Any]) -> bytes:
    size, kind = p["size"], p["type"]
    if isinstance(value, bytes | bytearray):
        b = bytes(value)
    elif isinstance(value, np.generic):
        b = value.tobytes()
    elif isinstance(value, ctypes._SimpleCData | ctypes.Structure):
        b = bytes(value)
    elif isinstance(value, float) or kind in ("f32", "f64"):
        b = struct.pack({4: "<f", 8: "<d"}[size], float(value))
    elif isinstance(value, int):
        b = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    else:
        raise SimError(f"cannot pass {value!r} to a kernel")
    if len(b) != size:
        raise SimError(f"argument {value!r} has {len(b)} bytes, the parameter {size}")
    return b


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


class Module:
    """Kernels and variables of some PTX."""

    def __init__(self, ptx: str, device: Device | None = None) -> None:
        self.device, self.ptx = device or Device(), ptx
        self.variables: dict[str, Buffer] = {}

        def place(_ctx, name, size, align, readonly, host):
            b = Buffer(
                self.device, np.zeros(size, np.uint8), name.decode(), readonly=bool(readonly)
            )
            self.variables[b.name] = b
            host[0] = b.host
            return b.addr

        self._h = _api().load(ptx.encode(), _Place(place), None)
        if not self._h:
            raise _error()
        self.kernels = {k["name"]: k for k in json.loads(_api().kernels(self._h))}

    @classmethod
    def from_cuda(cls, source: Path | str, arch: str = "sm_80", flags: tuple = ()) -> "Module":
        """A .cu file, or source text containing a newline, through nvcc; the PTX is cached."""
        text = source if "\n" in str(source) else Path(source).read_text()
        args = ["-ptx", f"-arch={arch}", "-std=c++17", *flags]
        key = hashlib.sha256(repr((text, args)).encode()).hexdigest()[:24]
        cache = build.BUILD / "cache" / "nvcc"
        out = cache / f"{key}.ptx"
        if not out.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as d:
                cu = Path(d) / "k.cu"
                cu.write_text(text)
                env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
                cmd = [nvcc(), *args, cu, "-o", Path(d) / "k.ptx"]
                r = subprocess.run(cmd, capture_output=True, text=True, env=env)
                if r.returncode:
                    raise SimError("nvcc failed:\n" + r.stderr)
                tmp = out.with_suffix(f".{os.getpid()}.tmp")
                shutil.copy(Path(d) / "k.ptx", tmp)
                os.replace(tmp, out)
        return cls(out.read_text())

    def kernel_name(self, name: str) -> str:
        """The one kernel whose name is, or contains, `name`."""
        found = [name] if name in self.kernels else [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise SimError(f"kernel {name!r}: found {found} of {sorted(self.kernels)}")
        return found[0]

    def decode(self, name: str) -> None:
        """Raise if the kernel contains an instruction that is not supported."""
        if _api().decode(self._h, self.kernel_name(name).encode()):
            raise _error()

    def read_symbol(self, name: str, dtype: Any = np.uint8) -> np.ndarray:
        return self._variable(name).array.view(dtype)

    def write_symbol(self, name: str, data: Any) -> None:
        b = bytes(data)
        self._variable(name).array[: len(b)] = np.frombuffer(b, np.uint8)

    def _variable(self, name: str) -> Buffer:
        found = [v for k, v in self.variables.items() if k == name or name in k]
        if len(found) != 1:
            raise SimError(f"variable {name!r} not found or ambiguous in {list(self.variables)}")
        return found[0]

    def launch(
        self,
        name: str,
        grid: Any,
        block: Any,
        args: Any = (),
        smem: int = 0,
        seed: int = 0,
        checks: Any = ("race", "init"),
        max_insts: int = 20_000_000_000,
        lines: bool = False,
        names: list[str] | None = None,
    ) -> Result:
        """Arguments: arrays, Buffers, None (null), numbers, bytes for structs by value.

        checks: of race, init, lanes; bounds, alignment, barriers and asynchronous copies are always
        checked. lines: stats["lines"] counts executions per PTX line.
        """
        name = self.kernel_name(name)
        k = self.kernels[name]
        if len(args) != len(k["params"]):
            raise SimError(f"{name} takes {len(k['params'])} arguments, {len(args)} given")
        before = len(self.device.buffers)
        bufs: dict[int, Buffer] = {}
        seen: dict[Any, Buffer] = {}
        blob = bytearray(k["param_bytes"])
        try:
            for i, (a, p) in enumerate(zip(args, k["params"], strict=True)):
                if a is None:
                    b = bytes(p["size"])
                elif isinstance(a, Buffer) or _host_range(a) is not None:
                    if not isinstance(a, Buffer):
                        key = _host_range(a)
                        if key not in seen:
                            label = names[i] if names else f"arg{i}"
                            seen[key] = self.device.buffer(a, label)
                        a = seen[key]
                    if p["size"] != 8:
                        raise SimError(f"argument {i} is an array, its parameter is not a pointer")
                    bufs[i] = a
                    b = struct.pack("<Q", a.addr)
                else:
                    b = _pack(a, p)
                blob[p["offset"] : p["offset"] + p["size"]] = b
            for buf in bufs.values():
                buf.map[:] = 0
            ranges = self.device.ranges()
            flags = sum(CHECKS[c] for c in set(checks or ())) | (8 if lines else 0)
            three = [(t, 1, 1) if isinstance(t, int) else (*t, 1, 1)[:3] for t in (grid, block)]
            launch = _Launch(
                name.encode(),
                U32x3(*three[0]),
                U32x3(*three[1]),
                U32x3(1, 1, 1),
                smem,
                flags,
                seed,
                max_insts,
                bytes(blob),
                ranges,
                len(blob),
                len(ranges),
            )
            text = _api().launch(self._h, ctypes.byref(launch))
            if text is None:
                raise _error()
            stats = json.loads(text.decode(errors="replace"), strict=False)
            return Result(stats, {i: b.coverage() for i, b in bufs.items()})
        finally:
            del self.device.buffers[before:]

    def __del__(self) -> None:
        if getattr(self, "_h", None):
            _api().unload(self._h)
