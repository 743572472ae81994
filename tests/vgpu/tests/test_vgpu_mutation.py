"""Sensitivity: delete one synchronisation instruction at a time from correct compiler output; the
simulator must notice (error or wrong result) for all that are not redundant."""

import re

import kernels as tk
import pytest
import torch
import triton.language as tl
from test_vgpu_triton import attn_ref
from vgpu.sim import Module, SimError, poison
from vgpu.sim_triton import Kernel


def mutants(ptx, pattern):
    L = ptx.split("\n")
    for i, text in enumerate(L):
        if re.search(pattern, text) and not text.strip().startswith("//"):
            yield i + 1, text.strip(), "\n".join(L[:i] + ["// removed"] + L[i + 1 :])


def survey(tk_, grid, args, check, pattern, seeds=(0, 1)):
    caught, missed = [], []
    for line, text, ptx in mutants(tk_.ptx, pattern):
        tk_.module = Module(ptx)
        how = None
        for s in seeds:
            try:
                tk_.launch(grid, args(), seed=s, max_insts=3_000_000)
                if not check():
                    how = "wrong result"
            except SimError as e:
                how = str(e).split("\n")[-1]
            if how:
                break
        (caught if how else missed).append((line, text, how))
    return caught, missed


def mm(arch, ns, desc=False):
    M, N, K = 64, 64, 160
    torch.manual_seed(0)
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    c = torch.empty(M, N)
    ref = a.float() @ b.float()
    if desc:

        def args():
            return dict(a=a, b=b, c=poison(c), M=M, N=N, K=K)

        k = Kernel(tk.desc_mm, args(), dict(BM=64, BN=64, BK=32), num_stages=ns, arch=arch)
    else:

        def args():
            return dict(
                a=a,
                b=b,
                c=poison(c),
                M=M,
                N=N,
                K=K,
                stride_am=K,
                stride_ak=1,
                stride_bk=N,
                stride_bn=1,
                stride_cm=N,
                stride_cn=1,
            )

        k = Kernel(
            tk.mm_tile,
            args(),
            dict(BM=64, BN=64, BK=32, ACC=tl.float32, PREC="tf32"),
            num_stages=ns,
            arch=arch,
        )

    def check():
        return bool((c - ref).abs().max() < 1e-3)

    k.launch((1,), args())
    assert check()
    return k, args, check


@pytest.mark.parametrize(
    "arch,ns,desc", [(80, 3, False), (80, 2, False), (90, 3, False), (90, 3, True)]
)
def test_matmul_mutants(arch, ns, desc):
    k, args, check = mm(arch, ns, desc)
    tot_c, tot_m = 0, []
    for pat in (
        r"^\s*bar\.sync",
        r"cp\.async\.wait_group",
        r"wgmma\.wait_group",
        r"fence\.proxy\.async",
        r"mbarrier\.arrive\.expect_tx",
        r"mbarrier\.init",
        r"wgmma\.commit_group",
    ):
        c, m = survey(k, (1,), args, check, pat)
        tot_c += len(c)
        tot_m += m
        for x in c:
            print("caught", x)
        for x in m:
            print("MISSED", x)
    print(f"caught {tot_c}, not noticed {len(tot_m)}")
    assert (
        tot_c >= 2 and len(tot_m) <= 2 * tot_c
    )  # several barriers in a row: each one alone is redundant


def test_no_barriers_descriptor():
    k, args, check = mm(90, 3, True)
    L = k.ptx.split("\n")
    first = next(i for i, text in enumerate(L) if "cp.async.bulk.tensor" in text)
    last = max(i for i, text in enumerate(L) if "wgmma.wait_group" in text)
    k.module = Module(
        "\n".join(
            "" if first < i < last and text.strip().startswith("bar.sync") else text
            for i, text in enumerate(L)
        )
    )
    with pytest.raises(SimError, match="race|not yet waited"):
        k.launch((1,), args())


@pytest.mark.parametrize("arch", [80, 90])
def test_attention_mutants(arch):
    M, N, D, BM, BN = 64, 128, 32, 64, 32
    torch.manual_seed(0)
    q, k, v = [torch.randn(1, L, D).half() for L in (M, N, N)]
    o, lse = torch.empty(1, M, D).half(), torch.empty(1, M)
    ref, ref_lse = attn_ref(q, k, v, True, 0.2)

    def args():
        return dict(
            q=q,
            k=k,
            v=v,
            o=poison(o),
            lse=poison(lse),
            scale=0.2,
            M=M,
            N=N,
            stride_qh=M * D,
            stride_qm=D,
            stride_kh=N * D,
            stride_kn=D,
            stride_vh=N * D,
            stride_vn=D,
            stride_oh=M * D,
            stride_om=D,
        )

    kern = Kernel(tk.attend, args(), dict(D=D, BM=BM, BN=BN, CAUSAL=True), num_stages=3, arch=arch)

    def check():
        return bool(
            (o.double() - ref).abs().max() < 4e-3 and (lse.double() - ref_lse).abs().max() < 1e-3
        )

    kern.launch((1, 1), args())
    assert check()
    for pat in (
        r"^\s*bar\.sync",
        r"cp\.async\.wait_group",
        r"wgmma\.wait_group",
        r"fence\.proxy\.async",
    ):
        c, m = survey(kern, (1, 1), args, check, pat)
        for x in c:
            print("caught", x)
        for x in m:
            print("MISSED", x)
        L = [i for i, text in enumerate(kern.ptx.split("\n")) if re.search(pat, text)]
        if L:  # all of a kind removed: always noticed
            kern.module = Module(
                re.sub(r"(?m)^.*(?:{}).*$".format(pat.replace("^", "")), "", kern.ptx)
            )
            with pytest.raises(SimError):
                kern.launch((1, 1), args())
        assert c or not L


def test_wait_removed_is_always_caught():
    k, args, check = mm(80, 3)
    ptx = re.sub(r"^\s*cp\.async\.wait_group.*$", "", k.ptx, flags=re.M)
    k.module = Module(ptx)
    with pytest.raises(SimError, match="not yet waited for"):
        k.launch((1,), args())
    k, args, check = mm(80, 3)
    k.module = Module(re.sub(r"^\s*bar\.sync.*$", "", k.ptx, flags=re.M))
    with pytest.raises(SimError, match="race|not yet waited|uninitialised"):
        k.launch((1,), args())
