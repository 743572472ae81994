"""What the compiler made of each CUDA kernel: registers, spills, occupancy, instructions; no times.

    python -m benchmarks.gpu_resources              # every kernel of the first architecture built
    python -m benchmarks.gpu_resources --spills     # of each: what spills, what is too large for it

Reads the machine code in fusedmm._C_cuda with cuobjdump and nvdisasm (Triton's wheel has both) and
needs no GPU.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

LIMITS = {  # KiB of shared memory and warps a multiprocessor; a block may have 1 KiB less
    "8.0": (164, 64), "8.6": (100, 48), "8.9": (100, 48), "9.0": (228, 64), "9.0a": (228, 64),
    "10.0": (228, 64), "12.0": (100, 48),
}  # fmt: skip
OPCODES = ("HMMA", "LDSM", "LDGSTS", "LDL", "STL")  # the last two: local memory
_PLAIN = {  # of mangled names
    "NS0_11ContrastiveE": "contrastive,", "NS0_7SigmoidE": "sigmoid,", "6__half": "fp16,",
    "13__nv_bfloat16": "bf16,", "fL": "fp32,L",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel of one architecture; `name` is kernel<arguments>, mangled."""

    name: str
    kernel: str
    arch: str
    threads: int
    smem: int
    registers: int
    stack: int
    opcodes: collections.Counter

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor."""
        warps = self.threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        kib, most = LIMITS[self.arch]
        return min(by_registers, kib * 1024 // (self.smem + 1024), most // warps)

    @property
    def title(self) -> str:
        """The kernel and its template arguments, for people."""
        name = self.name.replace("kernelI", "kernel<").removesuffix("E")
        for mangled, plain in _PLAIN.items():
            name = name.replace(mangled, plain)
        return re.sub(r"L[bi](\d+)E", r"\1,", name).rstrip(",") + ">"


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: on PATH or in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    return shutil.which(name)


def wanted(r: Resources) -> tuple[str, ...]:
    """Opcodes that a kernel must have: tensor cores, ldmatrix, asynchronous copies.

    ldmatrix moves 16-bit numbers, transposed where asked; the forward in fp32 transposes, and its
    scores are FMA, so that it reads plain words.
    """
    plain = r.kernel == "attend_fwd_kernel" and "If" in r.name
    return ("HMMA", "LDGSTS") if plain else ("HMMA", "LDSM", "LDGSTS")


def spills(r: Resources) -> bool:
    """Whether the kernel touches local memory."""
    return r.stack > 0 or r.opcodes["LDL"] + r.opcodes["STL"] > 0


def _dump(library: str, flag: str, arch: str) -> str:
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), flag, "-arch", "sm_" + arch.replace(".", ""), library]
    env = {**os.environ, "PATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@functools.cache
def _machine_code(library: str, arch: str) -> tuple[dict, dict]:
    """Of each function: the line on its resources, and how often it has each opcode."""
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _dump(library, "-res-usage", arch)))
    code: dict[str, collections.Counter] = {}
    for part in _dump(library, "-sass", arch).split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        code[name] = collections.Counter(
            re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", part, re.M)
        )
    return usage, code


def built() -> list[str]:
    """The architectures in the build."""
    from fusedmm import _C_cuda

    return [arch.removesuffix("+PTX") for arch in _C_cuda.archs.split()]


def read(pattern: str = "", arch: str | None = None) -> list[Resources]:
    """Every tile kernel whose mangled name matches `pattern`, for `arch` or the first built."""
    from fusedmm import _C_cuda

    arch = arch or built()[0]
    usage, code = _machine_code(_C_cuda.__file__, arch)
    found = []
    for k in _C_cuda.kernels():
        mangled = f"{k['kernel']}I{k['arguments']}E"
        for name, line in usage.items():
            if mangled not in name or not re.search(pattern, mangled):
                continue
            facts = dict(re.findall(r"(\w+):(\d+)", line))
            smem, stack = (
                k["smem"] + int(facts["SHARED"]),
                int(facts["STACK"]) + int(facts["LOCAL"]),
            )
            resources = k["threads"], smem, int(facts["REG"]), stack
            found.append(Resources(mangled, k["kernel"], arch, *resources, code[name]))
    return found


def markdown(rows: list[Resources]) -> str:
    """The table of one architecture."""
    lines = [
        f"# CUDA kernels as compiled for sm_{rows[0].arch.replace('.', '')}",
        "",
        "Made by `python -m benchmarks.gpu_resources` from machine code. Template arguments:",
        "softmax over rows, over columns (where there are two), dtype, padded width, and tokens of",
        "the short stream, or which tile by height. Bytes of shared memory and stack; blocks: how",
        "many fit a multiprocessor; instructions by opcode, of which LDL and STL are local memory.",
        "",
        "| kernel | threads | shared | registers | stack | blocks | " + " | ".join(OPCODES) + " |",
        "|---" * (6 + len(OPCODES)) + "|",
    ]
    for r in rows:
        cells = [r.threads, r.smem, r.registers, r.stack, r.blocks]
        cells += [r.opcodes[op] for op in OPCODES]
        lines.append(f"| `{r.title}` | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def spilling(archs: list[str]) -> str:
    """The table of all architectures."""
    lines = [
        "# CUDA kernels by architecture",
        "",
        "Made by `python -m benchmarks.gpu_resources --spills` from machine code. Too large: need",
        "more shared memory than a block may have there, where the launcher takes another kernel.",
        "Of those that fit, blocks: the fewest that one multiprocessor takes; spilling: how many",
        "instances of a kernel, and of the worst of them bytes of stack and loads + stores of",
        "local memory. Where tiles were chosen, csrc/cuda/tuning.h says.",
        "",
        "| architecture | kernels | too large | registers, at most | blocks | spilling |",
        "|---|---|---|---|---|---|",
    ]
    for arch in archs:
        rows = read(arch=arch)
        fit = [r for r in rows if r.smem <= (LIMITS[arch][0] - 1) * 1024]
        worst = collections.defaultdict(list)
        for r in filter(spills, fit):
            worst[r.kernel].append((r.stack, r.opcodes["LDL"], r.opcodes["STL"]))
        spilled = ", ".join(
            f"`{k}` {len(all)}: {max(all)[0]} B, {max(all)[1]} + {max(all)[2]}"
            for k, all in worst.items()
        )
        cells = [len(rows), len(rows) - len(fit), max(r.registers for r in rows)]
        cells += [min(r.blocks for r in fit), spilled or "none"]
        lines.append(f"| sm_{arch.replace('.', '')} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="registers, spills and occupancy by kernel")
    parser.add_argument("--spills", action="store_true", help="all architectures of the build")
    parser.add_argument("--out", help="default: benchmarks/results/gpu_resources[_spills].md")
    args = parser.parse_args()
    out = args.out or f"benchmarks/results/gpu_resources{'_spills' * args.spills}.md"
    Path(out).write_text(spilling(built()) if args.spills else markdown(read()))


if __name__ == "__main__":
    main()
