"""What the compiler made of each CUDA kernel: registers, spills, occupancy, instructions; no times.

    python -m benchmarks.gpu_resources

Reads the machine code in fusedmm._C_cuda with cuobjdump and nvdisasm (Triton's wheel has both) and
needs no GPU. Occupancy is blocks a multiprocessor of sm_80: 65536 registers, 164 KiB, 64 warps.
"""

import argparse
import collections
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

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
        return min(by_registers, 164 * 1024 // (self.smem + 1024), 64 // warps)


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


def _dump(library: str, flag: str) -> str:
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), flag, library]
    env = {**os.environ, "PATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def read(pattern: str = "") -> list[Resources]:
    """Every tile kernel of the build whose mangled name matches `pattern`."""
    from fusedmm import _C_cuda

    usage = dict(
        re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _dump(_C_cuda.__file__, "-res-usage"))
    )
    code: dict[str, collections.Counter] = {}
    for part in _dump(_C_cuda.__file__, "-sass").split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        code[name] = collections.Counter(
            re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", part, re.M)
        )
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
            found.append(Resources(mangled, k["kernel"], *resources, code[name]))
    return found


def markdown(rows: list[Resources]) -> str:
    """The table for people."""
    lines = [
        "# CUDA kernels as compiled for sm_80",
        "",
        "Made by `python -m benchmarks.gpu_resources` from machine code. Template arguments:",
        "softmax over rows, over columns (where there are two), dtype, padded width, and tokens of",
        "the short stream, or whether the tile is the taller of two. Bytes of shared memory and",
        "stack; blocks: how many fit a multiprocessor; instructions by opcode, of which LDL and",
        "STL are local memory.",
        "",
        "| kernel | threads | shared | registers | stack | blocks | " + " | ".join(OPCODES) + " |",
        "|---" * (6 + len(OPCODES)) + "|",
    ]
    for r in rows:
        name = r.name.replace("kernelI", "kernel<").removesuffix("E")
        for mangled, plain in _PLAIN.items():
            name = name.replace(mangled, plain)
        name = re.sub(r"L[bi](\d+)E", r"\1,", name).rstrip(",") + ">"
        cells = [r.threads, r.smem, r.registers, r.stack, r.blocks]
        cells += [r.opcodes[op] for op in OPCODES]
        lines.append(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="registers, spills and occupancy by kernel")
    parser.add_argument("--out", default="benchmarks/results/gpu_resources.md")
    args = parser.parse_args()
    Path(args.out).write_text(markdown(read()))


if __name__ == "__main__":
    main()
