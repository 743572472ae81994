"""Builds tests/cpp/kernels.cpp with ASan and UBSan for each instruction set of this CPU; runs it.

python tests/cpp/sanitize.py [ISA ...]
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
FLAGS = {
    "baseline": ("", ()),
    "avx2": ("-mavx2 -mfma -mf16c", ("avx2", "fma")),
    "avx512": (AVX512, ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "avx512bf16": (AVX512 + " -mavx512bf16", ("avx512f", "avx512_bf16")),
}
COMMON = "-std=c++17 -O1 -ffp-contract=fast -fno-omit-frame-pointer -Wno-psabi -pthread"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"
OPS = (
    "bi_attention_fwd", "bi_attention_bwd", "co_attention", "contrastive_loss", "sigmoid_loss",
)  # fmt: skip


def main(wanted: list[str]) -> int:
    """0 if every instruction set passed."""
    cpu = Path("/proc/cpuinfo").read_text()
    flags = set(cpu.split("flags", 1)[1].split("\n", 1)[0].split()) if "flags" in cpu else set()
    out = ROOT / "build" / "sanitize"
    out.mkdir(parents=True, exist_ok=True)
    for isa, (switches, needs) in FLAGS.items():
        if (wanted and isa not in wanted) or not flags.issuperset(needs):
            continue
        binary = out / isa
        sources = [ROOT / "tests/cpp/kernels.cpp", *(ROOT / f"csrc/cpu/{op}.cpp" for op in OPS)]
        command = f"g++ {COMMON} {SANITIZE} {switches} -DFMM_ISA={isa} -o {binary}".split()
        subprocess.run([*command, *map(str, sources)], check=True)
        sys.stdout.write(f"{isa}: ")
        sys.stdout.flush()
        if subprocess.run([str(binary)]).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
