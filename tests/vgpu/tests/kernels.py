"""Triton programs that validate the simulator. Shapes may be ragged: accesses outside are masked.

q, k, v, o, do; lse is the natural log of the sum of exp of the scaled scores; M rows, N keys.
"""

import triton
import triton.language as tl


@triton.jit
def vec_add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def softmax_rows(src, dst, M, N, stride_src, stride_dst, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS rows per program, exp(x - lse)."""
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.arange(0, COLS)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(
        src + offs_m[:, None] * stride_src + offs_n[None, :], mask=inside, other=float("-inf")
    ).to(tl.float32)
    top = tl.where(offs_m < M, tl.max(x, 1), 0.0)
    lse = top + tl.log(tl.sum(tl.exp(x - top[:, None]), 1))
    tl.store(
        dst + offs_m[:, None] * stride_dst + offs_n[None, :],
        tl.exp(x - lse[:, None]).to(dst.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def norm_fwd(x, gain, bias, y, stats, N, stride_x, stride_y, eps, COLS: tl.constexpr):
    """u = (x - mu) / sigma, y = gain u + bias; stats[row] = mu, 1 / sigma."""
    row = tl.program_id(0)
    offs_n = tl.arange(0, COLS)
    inside = offs_n < N
    u = tl.load(x + row * stride_x + offs_n, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(u, 0) / N
    u = tl.where(inside, u - mu, 0.0)
    inv = tl.rsqrt(tl.sum(u * u, 0) / N + eps)
    g = tl.load(gain + offs_n, mask=inside, other=0.0)
    h = tl.load(bias + offs_n, mask=inside, other=0.0)
    tl.store(y + row * stride_y + offs_n, tl.fma(u * inv, g, h).to(y.dtype.element_ty), mask=inside)
    tl.store(stats + 2 * row, mu)
    tl.store(stats + 2 * row + 1, inv)


@triton.jit
def norm_bwd_x(x, gain, dy, stats, dx, N, stride, COLS: tl.constexpr):
    """dx = (e - mean(e) - u mean(e u)) / sigma with e = gain dy."""
    row = tl.program_id(0)
    offs_n = tl.arange(0, COLS)
    inside = offs_n < N
    mu = tl.load(stats + 2 * row)
    inv = tl.load(stats + 2 * row + 1)
    e = tl.load(dy + row * stride + offs_n, mask=inside, other=0.0).to(tl.float32) * tl.load(
        gain + offs_n, mask=inside, other=0.0
    )
    u = (tl.load(x + row * stride + offs_n, mask=inside, other=0.0).to(tl.float32) - mu) * inv
    along = tl.sum(e * u, 0) / N
    r = inv * (e - tl.sum(e, 0) / N - along * u)
    tl.store(dx + row * stride + offs_n, r.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_gain(x, dy, stats, dgain, dbias, M, N, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Column sums of dy u and dy: one program per block of columns, a loop over blocks of rows."""
    offs_n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    g = tl.zeros([COLS], dtype=tl.float32)
    h = tl.zeros([COLS], dtype=tl.float32)
    for m0 in range(0, M, ROWS):
        offs_m = m0 + tl.arange(0, ROWS)
        rows = offs_m < M
        inside = rows[:, None] & (offs_n < N)[None, :]
        at = offs_m[:, None] * stride + offs_n[None, :]
        mu = tl.load(stats + 2 * offs_m, mask=rows, other=0.0)
        inv = tl.load(stats + 2 * offs_m + 1, mask=rows, other=0.0)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        u = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mu[:, None]) * inv[:, None]
        g += tl.sum(d * u, 0)
        h += tl.sum(d, 0)
    tl.store(dgain + offs_n, g, mask=offs_n < N)
    tl.store(dbias + offs_n, h, mask=offs_n < N)


@triton.jit
def locked_sum(x, total, guard, tally, N, B: tl.constexpr):
    """total += x[program], the read-modify-write under a spin lock; tally counts the entries."""
    offs = tl.arange(0, B)
    part = tl.load(x + tl.program_id(0) * N + offs, mask=offs < N, other=0.0)
    busy = tl.atomic_cas(guard, 0, 1)
    while busy != 0:
        busy = tl.atomic_cas(guard, 0, 1)
    entries = tl.load(tally)
    tl.store(total + offs, tl.load(total + offs, mask=offs < N, other=0.0) + part, mask=offs < N)
    tl.store(tally, entries + 1)
    tl.debug_barrier()
    tl.atomic_xchg(guard, 0)


@triton.jit
def mm_tile(
    a,
    b,
    c,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PREC: tl.constexpr,
):
    """c = a b, one program per tile; a of another type is converted (through registers)."""
    offs_m = tl.program_id(0) * BM + tl.arange(0, BM)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = offs_m < M
    cols = offs_n < N
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k0 in range(0, K, BK):
        offs_k = k0 + tl.arange(0, BK)
        inner = offs_k < K
        x = tl.load(
            a + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak,
            mask=rows[:, None] & inner[None, :],
            other=0.0,
        )
        y = tl.load(
            b + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn,
            mask=inner[:, None] & cols[None, :],
            other=0.0,
        )
        acc = tl.dot(x.to(y.dtype), y, acc, input_precision=PREC, out_dtype=ACC)
    tl.store(
        c + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn,
        acc.to(c.dtype.element_ty),
        mask=rows[:, None] & cols[None, :],
    )


# Attention. Tensors are [head, row, D] with unit stride along D. Causal: row m sees key n when
# n - m <= N - M (the last row sees every key). A row that sees no key: o = 0, lse = -inf.
@triton.jit
def _visible(offs_m, offs_n, M, N, CAUSAL: tl.constexpr):
    see = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if CAUSAL:
        see = see & (offs_n[None, :] - offs_m[:, None] <= N - M)
    return see


@triton.jit
def _block(p, stride, offs, limit, D: tl.constexpr):
    return tl.load(
        p + offs[:, None] * stride + tl.arange(0, D)[None, :],
        mask=(offs < limit)[:, None],
        other=0.0,
    )


@triton.jit
def attend(
    q,
    k,
    v,
    o,
    lse,
    scale,
    M,
    N,
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_oh,
    stride_om,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head = tl.program_id(1)
    m0 = tl.program_id(0) * BM
    offs_m = m0 + tl.arange(0, BM)
    qb = _block(q + head * stride_qh, stride_qm, offs_m, M, D)
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], dtype=tl.float32)
    out = tl.zeros([BM, D], dtype=tl.float32)
    end = N
    if CAUSAL:
        end = tl.minimum(N, m0 + BM + N - M)
    for n0 in range(0, end, BN):
        offs_n = n0 + tl.arange(0, BN)
        kb = _block(k + head * stride_kh, stride_kn, offs_n, N, D)
        s = tl.where(
            _visible(offs_m, offs_n, M, N, CAUSAL), tl.dot(qb, tl.trans(kb)) * scale, float("-inf")
        )
        higher = tl.maximum(peak, tl.max(s, 1))
        ref = tl.where(
            higher > float("-inf"), higher, 0.0
        )  # still nothing visible: any finite reference
        p = tl.exp(s - ref[:, None])
        decay = tl.exp(peak - ref)
        vb = _block(v + head * stride_vh, stride_vn, offs_n, N, D)
        out = tl.dot(p.to(vb.dtype), vb, out * decay[:, None])
        mass = mass * decay + tl.sum(p, 1)
        peak = higher
    some = mass > 0
    out = out / tl.where(some, mass, 1.0)[:, None]
    tl.store(
        lse + head * M + offs_m, tl.where(some, peak + tl.log(mass), float("-inf")), mask=offs_m < M
    )
    tl.store(
        o + head * stride_oh + offs_m[:, None] * stride_om + tl.arange(0, D)[None, :],
        out.to(o.dtype.element_ty),
        mask=(offs_m < M)[:, None],
    )


@triton.jit
def _score_grad(qb, kb, vb, ob, dob, z, offs_m, offs_n, M, N, scale, CAUSAL: tl.constexpr):
    """p and the gradient of the unscaled scores, both [m, n]; z: lse of the rows."""
    p = tl.where(
        _visible(offs_m, offs_n, M, N, CAUSAL),
        tl.exp(tl.dot(qb, tl.trans(kb)) * scale - z[:, None]),
        0.0,
    )
    delta = tl.sum(ob.to(tl.float32) * dob.to(tl.float32), 1)
    return p, p * (tl.dot(dob, tl.trans(vb)) - delta[:, None]) * scale


@triton.jit
def attend_grad_kv(
    q,
    k,
    v,
    o,
    do,
    lse,
    dk,
    dv,
    scale,
    M,
    N,
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program per block of keys; q, o, do share strides, and so do k, v, dk, dv."""
    head = tl.program_id(1)
    n0 = tl.program_id(0) * BN
    offs_n = n0 + tl.arange(0, BN)
    kb = _block(k + head * stride_kh, stride_kn, offs_n, N, D)
    vb = _block(v + head * stride_kh, stride_kn, offs_n, N, D)
    gk = tl.zeros([BN, D], dtype=tl.float32)
    gv = tl.zeros([BN, D], dtype=tl.float32)
    start = 0
    if CAUSAL:
        start = tl.maximum(n0 + M - N, 0) // BM * BM  # the first row that sees key n0
    for m0 in range(start, M, BM):
        offs_m = m0 + tl.arange(0, BM)
        qb = _block(q + head * stride_qh, stride_qm, offs_m, M, D)
        ob = _block(o + head * stride_qh, stride_qm, offs_m, M, D)
        dob = _block(do + head * stride_qh, stride_qm, offs_m, M, D)
        z = tl.load(lse + head * M + offs_m, mask=offs_m < M, other=0.0)
        p, ds = _score_grad(qb, kb, vb, ob, dob, z, offs_m, offs_n, M, N, scale, CAUSAL)
        gv = tl.dot(tl.trans(p.to(dob.dtype)), dob, gv)
        gk = tl.dot(tl.trans(ds.to(qb.dtype)), qb, gk)
    at = head * stride_kh + offs_n[:, None] * stride_kn + tl.arange(0, D)[None, :]
    tl.store(dk + at, gk.to(dk.dtype.element_ty), mask=(offs_n < N)[:, None])
    tl.store(dv + at, gv.to(dv.dtype.element_ty), mask=(offs_n < N)[:, None])


@triton.jit
def attend_grad_q(
    q,
    k,
    v,
    o,
    do,
    lse,
    dq,
    scale,
    M,
    N,
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program per block of rows; q, o, do, dq share strides, and so do k, v."""
    head = tl.program_id(1)
    m0 = tl.program_id(0) * BM
    offs_m = m0 + tl.arange(0, BM)
    qb = _block(q + head * stride_qh, stride_qm, offs_m, M, D)
    ob = _block(o + head * stride_qh, stride_qm, offs_m, M, D)
    dob = _block(do + head * stride_qh, stride_qm, offs_m, M, D)
    z = tl.load(lse + head * M + offs_m, mask=offs_m < M, other=0.0)
    gq = tl.zeros([BM, D], dtype=tl.float32)
    end = N
    if CAUSAL:
        end = tl.minimum(N, m0 + BM + N - M)
    for n0 in range(0, end, BN):
        offs_n = n0 + tl.arange(0, BN)
        kb = _block(k + head * stride_kh, stride_kn, offs_n, N, D)
        vb = _block(v + head * stride_kh, stride_kn, offs_n, N, D)
        p, ds = _score_grad(qb, kb, vb, ob, dob, z, offs_m, offs_n, M, N, scale, CAUSAL)
        gq = tl.dot(ds.to(kb.dtype), kb, gq)
    tl.store(
        dq + head * stride_qh + offs_m[:, None] * stride_qm + tl.arange(0, D)[None, :],
        gq.to(dq.dtype.element_ty),
        mask=(offs_m < M)[:, None],
    )


@triton.jit
def atomics_kernel(x, s, mx, mn, cnt, hist, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0)
    tl.atomic_add(s, tl.sum(v.to(tl.float32), axis=0))
    tl.atomic_max(mx, tl.max(v, axis=0))
    tl.atomic_min(mn, tl.min(v, axis=0))
    tl.atomic_add(cnt + (i % 8), 1, mask=m)
    tl.atomic_add(hist + (v & 15), 1, mask=m)


@triton.jit
def half_atomic(x, o, B: tl.constexpr, R: tl.constexpr):
    i = tl.arange(0, B)
    tl.atomic_add(o + i // R, tl.load(x + i))


@triton.jit
def reduce_kernel(
    x, osum, omax, oarg, oargmin, oxor, M: tl.constexpr, N: tl.constexpr, AX: tl.constexpr
):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    R: tl.constexpr = N if AX == 0 else M
    i = tl.arange(0, R)
    tl.store(osum + i, tl.sum(v, axis=AX))
    tl.store(omax + i, tl.max(v, axis=AX))
    tl.store(oarg + i, tl.argmax(v, axis=AX))
    tl.store(oargmin + i, tl.argmin(v, axis=AX))
    tl.store(oxor + i, tl.xor_sum((v * 1000).to(tl.int32), axis=AX))


@triton.jit
def _mul(a, b):
    return a * b


@triton.jit
def _affine(s0, t0, s1, t1):  # x -> s0 x + t0, then x -> s1 x + t1
    return s0 * s1, t0 * s1 + t1


@triton.jit
def scan_kernel(x, osum, orev, omul, olin, M: tl.constexpr, N: tl.constexpr, AX: tl.constexpr):
    o = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + o)
    tl.store(osum + o, tl.cumsum(v, axis=AX))
    tl.store(orev + o, tl.cumsum(v, axis=AX, reverse=True))
    tl.store(omul + o, tl.associative_scan(1.0 + v * 0.1, AX, _mul))
    a, b = tl.associative_scan((v, v + 1), AX, _affine)
    tl.store(olin + o, b)


@triton.jit
def sort_kernel(x, o, od, M: tl.constexpr, N: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + p)
    tl.store(o + p, tl.sort(v))
    tl.store(od + p, tl.sort(v, descending=True))


@triton.jit
def trans_kernel(x, o, M: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(o + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(v))


@triton.jit
def cast_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m).to(o.dtype.element_ty), mask=m)


@triton.jit
def math_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < n
    a = tl.load(x + i, mask=m)
    b = tl.load(y + i, mask=m)
    tl.store(o + 0 * n + i, tl.exp(a), mask=m)
    tl.store(o + 1 * n + i, tl.log(b), mask=m)
    tl.store(o + 2 * n + i, tl.sin(a) + tl.cos(b), mask=m)
    tl.store(o + 3 * n + i, tl.sqrt(b) + tl.rsqrt(b), mask=m)
    tl.store(o + 4 * n + i, a / b, mask=m)
    tl.store(o + 5 * n + i, tl.math.erf(a), mask=m)
    tl.store(o + 6 * n + i, tl.floor(a) + tl.ceil(b), mask=m)
    tl.store(o + 7 * n + i, tl.sigmoid(a), mask=m)
    tl.store(o + 8 * n + i, tl.math.fma(a, b, a), mask=m)
    tl.store(o + 9 * n + i, tl.math.div_rn(a, b) + tl.math.sqrt_rn(b), mask=m)
    tl.store(o + 10 * n + i, tl.maximum(a, b) - tl.minimum(a, b) + tl.abs(a), mask=m)


@triton.jit
def int_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < n
    a = tl.load(x + i, mask=m)
    b = tl.load(y + i, mask=m, other=1)
    tl.store(o + 0 * n + i, a // b, mask=m)
    tl.store(o + 1 * n + i, a % b, mask=m)
    tl.store(o + 2 * n + i, (a << 3) ^ (b >> 2) | (a & b), mask=m)
    tl.store(o + 3 * n + i, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32), mask=m)
    tl.store(o + 4 * n + i, tl.where(a > b, a, b) - tl.minimum(a, b), mask=m)
    tl.store(o + 5 * n + i, (a.to(tl.int64) * b.to(tl.int64) >> 7).to(tl.int32), mask=m)


@triton.jit
def rand_kernel(o, seed, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.rand(seed, i))


@triton.jit
def spin_kernel(flag, o, N: tl.constexpr):
    pid = tl.program_id(0)
    while tl.atomic_add(flag, 0) != pid:
        pass
    v = tl.load(o + N)
    tl.store(o + pid, v)
    tl.store(o + N, v + pid + 1)
    tl.debug_barrier()
    tl.atomic_add(flag, 1)


@triton.jit
def gather_kernel(x, idx, o, M: tl.constexpr, N: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(o + p, tl.gather(tl.load(x + p), tl.load(idx + p), 1))


@triton.jit
def desc_mm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    left = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    right = tl.make_tensor_descriptor(b, shape=[K, N], strides=[N, 1], block_shape=[BK, BN])
    m0 = tl.program_id(0) * BM
    n0 = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        acc = tl.dot(left.load([m0, k0]), right.load([k0, n0]), acc)
    tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN]).store(
        [m0, n0], acc.to(c.dtype.element_ty)
    )


@triton.jit
def hostdesc_mm(left, right, dest, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m0 = tl.program_id(0) * BM
    n0 = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        acc = tl.dot(left.load([m0, k0]), right.load([n0, k0]).T, acc)
    dest.store([m0, n0], acc.to(tl.float16))


@triton.jit
def desc_attend(
    q,
    k,
    v,
    o,
    lse,
    scale,
    heads,
    M,
    N,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WS: tl.constexpr,
):
    """Attention with 3-D tensor descriptors: rows past the end of a head read 0, are not stored."""
    qd = tl.make_tensor_descriptor(
        q, shape=[heads, M, D], strides=[M * D, D, 1], block_shape=[1, BM, D]
    )
    kd = tl.make_tensor_descriptor(
        k, shape=[heads, N, D], strides=[N * D, D, 1], block_shape=[1, BN, D]
    )
    vd = tl.make_tensor_descriptor(
        v, shape=[heads, N, D], strides=[N * D, D, 1], block_shape=[1, BN, D]
    )
    od = tl.make_tensor_descriptor(
        o, shape=[heads, M, D], strides=[M * D, D, 1], block_shape=[1, BM, D]
    )
    head = tl.program_id(1)
    m0 = tl.program_id(0) * BM
    qb = qd.load([head, m0, 0]).reshape(BM, D)
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], dtype=tl.float32)
    out = tl.zeros([BM, D], dtype=tl.float32)
    for n0 in tl.range(0, N, BN, warp_specialize=WS):
        kb = kd.load([head, n0, 0]).reshape(BN, D)
        s = tl.where((n0 + tl.arange(0, BN) < N)[None, :], tl.dot(qb, kb.T) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        decay = tl.exp(peak - higher)
        vb = vd.load([head, n0, 0]).reshape(BN, D)
        out = tl.dot(p.to(vb.dtype), vb, out * decay[:, None])
        mass = mass * decay + tl.sum(p, 1)
        peak = higher
    offs_m = m0 + tl.arange(0, BM)
    tl.store(lse + head * M + offs_m, peak + tl.log(mass), mask=offs_m < M)
    od.store([head, m0, 0], (out / mass[:, None]).to(o.dtype.element_ty).reshape(1, BM, D))


@triton.jit
def resident_mm(
    a,
    b,
    c,
    M,
    N,
    K,
    CTAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WS: tl.constexpr,
):
    """A fixed number of programs share all tiles; b is [N, K]."""
    left = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    right = tl.make_tensor_descriptor(b, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    dest = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    tall = tl.cdiv(M, BM)
    for job in tl.range(
        tl.program_id(0), tall * tl.cdiv(N, BN), CTAS, flatten=False, warp_specialize=WS
    ):
        m0 = (job % tall) * BM
        n0 = (job // tall) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, K, BK):
            acc = tl.dot(left.load([m0, k0]), right.load([n0, k0]).T, acc)
        dest.store([m0, n0], acc.to(c.dtype.element_ty))


@triton.jit
def desc_ops(
    x, o, s, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr
):
    dx = tl.make_tensor_descriptor(
        x, shape=[A, B, C], strides=[B * C, C, 1], block_shape=[1, BB, BC]
    )
    do = tl.make_tensor_descriptor(o, shape=[B, C], strides=[C, 1], block_shape=[BB, BC])
    ds = tl.make_tensor_descriptor(s, shape=[B, C], strides=[C, 1], block_shape=[BB, BC])
    for i in range(A):
        v = dx.load([i, tl.program_id(0) * BB, tl.program_id(1) * BC]).reshape(BB, BC)
        do.atomic_add([tl.program_id(0) * BB, tl.program_id(1) * BC], v)
        ds.atomic_max([tl.program_id(0) * BB, tl.program_id(1) * BC], (v * 100).to(tl.int32))
