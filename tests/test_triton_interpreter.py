"""The Triton kernels under TRITON_INTERPRET=1, on CPU tensors, against the reference: no GPU, real
or virtual. bf16 is left out: the interpreter multiplies bit patterns there.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from fusedmm.backends.reference import bi_attention as exact
from fusedmm.backends.triton import bi_attention as ours, contrastive_loss, sigmoid_loss
from fusedmm.backends.reference import contrastive_loss as c_exact, sigmoid_loss as s_exact
from fusedmm.ops import pairs

def near(got, want, tol):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        error = torch.where(g == w, 0.0, (g.double() - w).abs()).max()
        assert error < tol, (i, error)

torch.manual_seed(0)
for dtype, tol in ((torch.float32, 2e-5), (torch.float16, 8e-3)):
    for M, N in ((70, 20), (40, 37)):
        x, y, vx, vy = (torch.randn(1, 2, n, 16).to(dtype) for n in (M, N, M, N))
        mask_x, mask_y = torch.rand(1, M) > 0.3, torch.rand(1, N) > 0.3
        bias, seed = torch.randn(1, 1, M, N).to(dtype), torch.tensor([2**40 + 7])
        common = (mask_x, mask_y, bias)
        rest = (1.5, 0.3, 0.2, seed)
        want = exact.fwd(*(t.double() for t in (x, y, vx, vy)), *common, *rest)
        got = ours.fwd(x, y, vx, vy, *common, *rest)
        near(got, want, tol)
        up = [torch.randn_like(w).to(g.dtype) for g, w in zip(got, want)]
        needs = [True] * 5
        back = ours.bwd(*up, x, y, vx, vy, *common, *got, *rest, needs)
        data = [t.double() for t in (*up, x, y, vx, vy)]
        near(back, exact.bwd(*data, *common, *want, *rest, needs), 10 * tol)
    x, y = torch.randn(1, 45, 20).to(dtype), torch.randn(1, 45, 20).to(dtype)
    scale, positives = torch.tensor([3.0]), pairs.default_positives(1, 45, "cpu")
    args = (scale, positives, None, None, False, True, True, True)
    near(contrastive_loss.fwd(x, y, *args), c_exact.fwd(x.double(), y.double(), *args), 10 * tol)
    args = (scale, torch.tensor([-1.0]), positives, None, None, False)
    near([sigmoid_loss.fwd(x, y, *args)], [s_exact.fwd(x.double(), y.double(), *args)], 10 * tol)
    up = torch.randn(1, 45)
    got = sigmoid_loss.bwd(up, x, y, *args, [True] * 4)
    near(got, s_exact.bwd(up.double(), x.double(), y.double(), *args, [True] * 4), 20 * tol)
"""


def test_interpreter_agrees_with_the_reference():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
