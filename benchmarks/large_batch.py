"""python -m benchmarks.large_batch: one contrastive loss of 65,536 pairs, forward and backward, in
under 2 GiB of resident memory, process and inputs included.

Prints what it took and exits 1 beyond the limit; `--save` writes it to benchmarks/results.
One score matrix of that size is 16 GiB in fp32.
"""

import argparse
import datetime
import json
import sys
import time

import torch

import fusedmm

from . import measure, run

RESULT = run.RESULTS / "large_batch.json"


def loss_and_gradients(rows: int, width: int) -> tuple[float, float]:
    """The loss, and the seconds of forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, width, generator=generator).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    start = time.perf_counter()
    loss = fusedmm.contrastive_loss(x, y, scale, normalize=True, backend="cpu")
    loss.backward()
    seconds = time.perf_counter() - start
    if not all(t.grad.isfinite().all() for t in (x, y, scale)):
        raise FloatingPointError("large_batch: gradients: expected finite ones")
    return loss.item(), seconds


def main(argv: list[str]) -> int:
    """Runs it; the exit status says whether the limit held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_batch", description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--limit-mib", type=float, default=2048.0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    fusedmm.contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), 1.0, backend="cpu")  # loads code
    before = measure._status("VmHWM")
    with measure.Others() as others:
        loss, seconds = loss_and_gradients(args.rows, args.width)
    peak = measure._status("VmHWM")
    record = {
        "rows": args.rows, "width": args.width, "dtype": "fp32", "loss": loss,
        "seconds": seconds, "threads": torch.get_num_threads(), "others": others.share,
        "peak_bytes": peak, "before_bytes": before,
        "machine": run.machine(), "commit": run._commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.large_batch --save",
    }  # fmt: skip
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if args.save:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return int(peak > args.limit_mib * 2**20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
