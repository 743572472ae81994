"""The Triton kernels compile for an AMD device as well: compiled to machine code, never run."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Amd:
    def get_current_target(self): return GPUTarget("hip", "gfx942", 64)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Amd())
compiled, run = [], JITFunction.run
def only_compile(self, *args, grid, warmup, **kwargs):
    compiled.append(self.__name__)
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.asm["hsaco"], self.__name__
JITFunction.run = only_compile

from fusedmm.backends.triton import bi_attention, co_attention, contrastive_loss, sigmoid_loss
from fusedmm.ops import pairs

def rand(*shape):
    return torch.randn(*shape).half()

for M, N in ((64, 32), (300, 300)):
    x, y = rand(1, 1, M, 32), rand(1, 1, N, 32)
    lse_x, lse_y = torch.zeros(1, 1, M), torch.zeros(1, 1, N)
    mask_x, mask_y = torch.ones(1, M, dtype=torch.bool), torch.ones(1, N, dtype=torch.bool)
    tail = (mask_x, mask_y, rand(1, 1, M, N))
    rest = (1.5, 0.3, 0.2, torch.tensor([2**40 + 7]))
    out = bi_attention.fwd(x, y, x, y, *tail, *rest)
    bi_attention.bwd(x, y, lse_x, lse_y, x, y, x, y, *tail, *out, *rest, [True] * 5)
bias = (rand(1, 1, M, N), None)
rest = (0.3, 0.3, 0.2, torch.tensor([2**40 + 7]))
out = co_attention.fwd(x, x, x, y, y, y, mask_x, mask_y, *bias, *rest)
needs = [True] * 7 + [False]
co_attention.bwd(
    x, y, lse_x, lse_y, x, x, x, y, y, y, mask_x, mask_y, *bias, *out, *rest, needs
)
x, scale, positives = rand(1, 64, 32), torch.ones(1), pairs.default_positives(1, 64, "cpu")
common = (scale, positives, None, None, False, True)
contrastive_loss.fwd(x, x, *common, True, True)
contrastive_loss.bwd(torch.ones(5, 1, 64), torch.ones(5, 1, 64), x, x, *common, [True] * 3)
common = (scale, scale, positives, None, None, True)
sigmoid_loss.fwd(x, x, *common)
sigmoid_loss.bwd(torch.ones(1, 64), x, x, *common, [True] * 4)
print(len(set(compiled)), "kernels")
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_amd():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 15, done.stdout
