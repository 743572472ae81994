"""Fills fusedmm/tuning/tables/<op>.<gpu>.json by timing tiles on the GPU at hand.

    python -m benchmarks.tune                       # every op
    python -m benchmarks.tune --ops bi_attention

One kernel at a time, the others at their present choice, forward and backward together; a tile that
does not fit the device is passed over. Refuses to run on the virtual GPU, whose times mean nothing.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import torch
import triton

import fusedmm
from fusedmm.tuning import lookup

OPS = ["co_attention", "bi_attention", "contrastive_loss", "sigmoid_loss"]
TABLES = Path(lookup.__file__).parent / "tables"
# M, N of the calls to be timed: whatever regime a kernel serves, one of them reaches it.
ATTENTION = ((4096, 128), (64, 64), (256, 256), (2048, 2048))
LOSS = 8192
CANDIDATES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}


def call(op: str, dtype: torch.dtype, width: int, sizes: tuple[int, int]):
    """A closure that runs forward and backward of `op`."""
    M, N = sizes
    if op in ("co_attention", "bi_attention"):
        lengths = (M, M, M, N, N, N) if op == "co_attention" else (M, N, M, N)
        tensors = [torch.randn(4, 8, n, width, device="cuda", dtype=dtype) for n in lengths]
    else:
        tensors = [torch.randn(n, width, device="cuda", dtype=dtype) for n in sizes]
    for t in tensors:
        t.requires_grad_()
    extra = {"contrastive_loss": (10.0,), "sigmoid_loss": (10.0, -10.0)}.get(op, ())

    def run() -> None:
        out = getattr(fusedmm, op)(*tensors, *extra, backend="triton")
        total = sum(o.float().sum() for o in out) if isinstance(out, tuple) else out
        torch.autograd.grad(total, tensors)

    return run


def time_of(runs, op: str, kernel: str, tile: dict[str, int]) -> float:
    """Milliseconds of all runs with this tile; infinity where it does not compile or fit."""
    with lookup.forced(op, kernel, tile):
        try:
            return sum(triton.testing.do_bench(run, quantiles=[0.5]) for run in runs)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            return float("inf")


def tune_row(op: str, row: dict) -> dict:
    """The row with the fastest tile and its evidence."""
    dtype = {16: torch.bfloat16, 32: torch.float32}[row["bits"]]
    shapes = ATTENTION if op.endswith("attention") else ((LOSS, LOSS),)
    runs = [call(op, dtype, row["width"], sizes) for sizes in shapes]
    sizes = {k: v for k, v in CANDIDATES.items() if k in row["tile"]}
    tiles = [dict(zip(sizes, c, strict=True)) for c in itertools.product(*sizes.values())]
    tiles = [row["tile"], *({**row["tile"], **t} for t in tiles)]
    times = [time_of(runs, op, row["kernel"], tile) for tile in tiles]
    best = min(range(len(tiles)), key=times.__getitem__)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    evidence = f"{times[best]:.4f} ms against {times[0]:.4f} ms by default; {versions}"
    return row | {"tile": tiles[best], "evidence": evidence}


def write(op: str, rows: list[dict], gpu: str) -> Path:
    """One row a line, so that a change of one is a diff of one."""
    path = TABLES / f"{op}.{gpu}.json"
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(r)}" for r in rows) + "\n]\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=OPS)
    args = parser.parse_args()
    if os.environ.get("VGPU_ACTIVE") == "1" or not torch.cuda.is_available():
        raise SystemExit("tune: expected a real GPU")
    for op in args.ops:
        rows = json.loads((TABLES / f"{op}.default.json").read_text())
        write(op, [tune_row(op, row) for row in rows], lookup.gpu_name())


if __name__ == "__main__":
    main()
