"""A plain Triton flash attention, one direction a call: the baseline of gpu_counts.py.

FlashAttention-2 as everybody writes it: contiguous inputs, lengths that fill tiles, no mask, bias
or dropout, base-2 softmax with the scale folded in; backward as delta, dk and dv, dq (7 products).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def fwd_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, qk_scale, M, N, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """o, and lse in base 2, of BLOCK_M queries. Grid: tiles of queries, B * H."""
    bh = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    rows = offs_m[:, None] * D + offs_d[None, :]
    columns = offs_n[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptr + bh * M * D + rows)
    k_ptrs = k_ptr + bh * N * D + columns
    v_ptrs = v_ptr + bh * N * D + columns
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for _ in range(0, N, BLOCK_N):
        s = tl.dot(q, tl.trans(tl.load(k_ptrs)), input_precision="ieee")
        new_top = tl.maximum(top, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(q.dtype), tl.load(v_ptrs), acc, input_precision="ieee")
        top = new_top
        k_ptrs += BLOCK_N * D
        v_ptrs += BLOCK_N * D
    tl.store(o_ptr + bh * M * D + rows, (acc / total[:, None]).to(q.dtype))
    tl.store(lse_ptr + bh * M + offs_m, top + tl.log2(total))


@triton.jit
def delta_kernel(o_ptr, do_ptr, delta_ptr, BLOCK_M: tl.constexpr, D: tl.constexpr):
    """delta = rowsum(do * o). Grid: tiles of BLOCK_M rows of all heads."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = offs_m[:, None] * D + tl.arange(0, D)[None, :]
    o, do = tl.load(o_ptr + rows), tl.load(do_ptr + rows)
    tl.store(delta_ptr + offs_m, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale, qk_scale,
               M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """dk and dv of BLOCK_N keys, with s and p transposed. Grid: tiles of keys, B * H."""
    bh = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, D)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = bh * N * D + offs_n[:, None] * D + offs_d[None, :]
    k, v = tl.load(k_ptr + columns), tl.load(v_ptr + columns)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        rows = bh * M * D + offs_m[:, None] * D + offs_d[None, :]
        q, do = tl.load(q_ptr + rows), tl.load(do_ptr + rows)
        lse = tl.load(lse_ptr + bh * M + offs_m)
        delta = tl.load(delta_ptr + bh * M + offs_m)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(s * qk_scale - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    tl.store(dk_ptr + columns, (dk * scale).to(k.dtype))
    tl.store(dv_ptr + columns, dv.to(k.dtype))


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, scale, qk_scale, M, N,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """dq of BLOCK_M queries. Grid: tiles of queries, B * H."""
    bh = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = bh * M * D + offs_m[:, None] * D + offs_d[None, :]
    q, do = tl.load(q_ptr + rows), tl.load(do_ptr + rows)
    lse = tl.load(lse_ptr + bh * M + offs_m)
    delta = tl.load(delta_ptr + bh * M + offs_m)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        columns = bh * N * D + offs_n[:, None] * D + offs_d[None, :]
        k, v = tl.load(k_ptr + columns), tl.load(v_ptr + columns)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    tl.store(dq_ptr + rows, (dq * scale).to(q.dtype))


def _block(length: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides the length."""
    block = largest
    while length % block:
        block //= 2
    if block < 16:
        raise ValueError(f"plain_flash: length: expected a multiple of 16, got {length}")
    return block


class PlainFlash(torch.autograd.Function):
    """o = softmax(scale * q @ k.mT) @ v for contiguous [B, H, L, D]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        B, H, M, D = q.shape
        N = k.shape[2]
        o, lse = torch.empty_like(q), q.new_empty((B, H, M), dtype=torch.float32)
        block_m, block_n = _block(M, 128), _block(N, 64)
        fwd_kernel[(M // block_m, B * H)](
            q, k, v, o, lse, scale * LOG2E, M, N, block_m, block_n, D, num_warps=4, num_stages=3
        )
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        B, H, M, D = q.shape
        N, scale = k.shape[2], ctx.scale
        do, delta = do.contiguous(), torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta_kernel[(B * H * M // 16,)](o, do, delta, 16, D)
        options = dict(num_warps=8, num_stages=2)
        block_m, block_n = _block(M, 64), _block(N, 128)
        dkv_kernel[(N // block_n, B * H)](
            q, k, v, do, lse, delta, dk, dv, scale, scale * LOG2E, M, N, block_m, block_n, D,
            **options,
        )  # fmt: skip
        block_m, block_n = _block(M, 128), _block(N, 64)
        dq_kernel[(M // block_m, B * H)](
            q, k, v, do, lse, delta, dq, scale, scale * LOG2E, M, N, block_m, block_n, D,
            **options,
        )  # fmt: skip
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One direction of attention."""
    return PlainFlash.apply(q, k, v, scale)
