"""Ordinary torch code on cuda tensors, checked against the same code on the CPU."""

import io
import threading

import pytest
import torch
import torch.nn.functional as F
import vgpu
from torch import nn

dev = "cuda"


def test_device():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    p = torch.cuda.get_device_properties(0)
    a = vgpu.arch()
    assert (p.major * 10 + p.minor, p.multi_processor_count) == {
        80: (80, 108),
        86: (86, 84),
        90: (90, 132),
    }[a]
    assert p.shared_memory_per_block_optin == {80: 163, 86: 99, 90: 227}[a] * 1024
    assert "not hardware" in p.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic(dtype):
    a, b = torch.randn(33, 17, dtype=dtype), torch.randn(33, 17, dtype=dtype)
    A, B = a.to(dev), b.to(dev)
    for f in (
        lambda x, y: x + y,
        lambda x, y: x * 2 - y / 3,
        lambda x, y: x @ y.t(),
        lambda x, y: torch.softmax(x, -1),
        lambda x, y: (x > y).sum(),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.t()[::2].contiguous(),
        lambda x, y: torch.cat([x, y]).mean(0),
        lambda x, y: x.float().cumsum(0),
        lambda x, y: torch.stack([x, y], -1).sum((0, 2)),
    ):
        r = f(A, B)
        assert r.device.type == "cuda"
        torch.testing.assert_close(r.cpu(), f(a, b))


def test_inplace_views_and_out():
    x = torch.arange(24.0, device=dev).view(4, 6)
    x[1:3, ::2] = 7
    x[:, 1].mul_(2)
    x.t()[0] += 1
    r = torch.arange(24.0).view(4, 6)
    r[1:3, ::2] = 7
    r[:, 1].mul_(2)
    r.t()[0] += 1
    assert torch.equal(x.cpu(), r)
    out = torch.empty(0, device=dev)
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), r + 1) and out.is_cuda
    out = torch.empty(4, 6, device=dev)
    p = out.data_ptr()
    torch.mul(x, x, out=out)
    assert out.data_ptr() == p and torch.equal(out.cpu(), r * r)
    i = torch.tensor([2, 0], device=dev)
    assert torch.equal(x[i].cpu(), r[[2, 0]])
    x[i] = 0
    r[[2, 0]] = 0
    assert torch.equal(x.cpu(), r)
    v, j = x.topk(2, dim=1)
    assert v.is_cuda and j.is_cuda
    assert torch.equal(x.nonzero().cpu(), r.nonzero())


def test_copies():
    a = torch.randn(5, 7)
    x = a.to(dev, torch.float16)
    assert torch.equal(x.cpu(), a.half())
    y = torch.empty(7, 5, device=dev).t()
    y.copy_(a)
    assert torch.equal(y.cpu(), a)
    z = torch.empty(5, 7)
    z.copy_(y.flip(0))
    assert torch.equal(z, a.flip(0))
    p = a.pin_memory()
    assert p.is_pinned() and not a.is_pinned()
    assert torch.equal(p.to(dev, non_blocking=True).cpu(), a)
    f = io.BytesIO()
    torch.save(y, f)
    f.seek(0)
    assert torch.equal(torch.load(f), y)
    assert y[2, 3].item() == a[2, 3].item() and float(y.sum()) == pytest.approx(
        float(a.sum()), rel=1e-4
    )


def test_device_mismatch():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=dev) + torch.ones(3)
    assert torch.equal((torch.ones(3, device=dev) * torch.tensor(2.0)).cpu(), torch.full((3,), 2.0))


def test_rng():
    torch.manual_seed(5)
    a = torch.randn(100, device=dev)
    b = torch.rand(100, device=dev)
    torch.manual_seed(5)
    assert torch.equal(a, torch.randn(100, device=dev)) and torch.equal(
        b, torch.rand(100, device=dev)
    )
    s = torch.cuda.get_rng_state()
    c = torch.randn(10, device=dev)
    torch.cuda.set_rng_state(s)
    assert torch.equal(c, torch.randn(10, device=dev))
    c0 = torch.get_rng_state()
    F.dropout(torch.ones(1000, device=dev), 0.3)
    assert torch.equal(c0, torch.get_rng_state()), "the CPU generator must not move"
    g = torch.Generator(device=dev).manual_seed(3)
    d = torch.randint(0, 9, (50,), device=dev, generator=g)
    g.manual_seed(3)
    assert torch.equal(d, torch.randint(0, 9, (50,), device=dev, generator=g))
    assert 0.25 < (F.dropout(torch.ones(10000, device=dev), 0.3) == 0).float().mean().item() < 0.35
    with torch.random.fork_rng():
        torch.randn(3, device=dev)
    assert sorted(torch.randperm(10, device=dev).tolist()) == list(range(10))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=dev, generator=torch.Generator())


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(128),
        nn.Linear(128, 5),
    )


def test_training_matches_cpu():
    m, r = small().to(dev), small()
    x, t = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
    om, orf = torch.optim.AdamW(m.parameters(), 1e-2), torch.optim.AdamW(r.parameters(), 1e-2)
    for _ in range(4):
        for net, o, X, T in ((m, om, x.to(dev), t.to(dev)), (r, orf, x, t)):
            o.zero_grad()
            F.cross_entropy(net(X), T).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            o.step()
    for a, b in zip(m.parameters(), r.parameters(), strict=False):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "opt",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_optimizers(opt):
    w = torch.full((5,), 3.0, device=dev, requires_grad=True)
    o = opt([w])
    for _ in range(5):
        o.zero_grad()
        (w**2).sum().backward()
        o.step()
    assert (w < 3).all()


def test_amp_and_scaler():
    m = small().to(dev)
    o, s = torch.optim.SGD(m.parameters(), 0.01), torch.amp.GradScaler("cuda", init_scale=256.0)
    with torch.autocast("cuda", dtype=torch.float16):
        h = m[0](torch.randn(2, 3, 8, 8, device=dev))
        assert h.dtype == torch.float16
        loss = F.cross_entropy(
            m(torch.randn(2, 3, 8, 8, device=dev)), torch.tensor([1, 2], device=dev)
        )
    w = m[-1].weight.detach().clone()
    s.scale(loss).backward()
    s.step(o)
    s.update()
    assert not torch.equal(w, m[-1].weight) and s.get_scale() == 256.0
    for p in m.parameters():
        p.grad.fill_(float("inf"))
    s.scale(torch.ones((), device=dev))
    s.step(o)
    s.update()
    assert s.get_scale() == 128.0


def test_sdpa_and_transformer():
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    mask = torch.rand(9, 9) > 0.3
    mask[:, 0] = True
    for kw in ({}, {"is_causal": True}, {"attn_mask": mask}):
        Q = q.to(dev).requires_grad_()
        kd = {a: (b.to(dev) if torch.is_tensor(b) else b) for a, b in kw.items()}
        o = F.scaled_dot_product_attention(Q, k.to(dev), v.to(dev), **kd)
        o.square().sum().backward()
        c = q.clone().requires_grad_()
        r = F.scaled_dot_product_attention(c, k, v, **kw)
        r.square().sum().backward()
        torch.testing.assert_close(o.cpu(), r, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(Q.grad.cpu(), c.grad, atol=1e-4, rtol=1e-4)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).to(dev)
    x = torch.randn(2, 5, 16, device=dev)
    a = layer(x)
    with torch.no_grad():
        b = layer.eval()(x)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_rnn(kind):
    torch.manual_seed(1)
    r = kind(4, 6, 2, bidirectional=True)
    m = kind(4, 6, 2, bidirectional=True).to(dev)
    m.load_state_dict(r.state_dict())
    x = torch.randn(3, 2, 4)
    a, b = m(x.to(dev))[0], r(x)[0]
    torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-4)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(m.weight_hh_l0.grad.cpu(), r.weight_hh_l0.grad, atol=1e-4, rtol=1e-4)


def test_streams_events_memory():
    s = torch.cuda.Stream()
    e0, e1 = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    e0.record()
    with torch.cuda.stream(s):
        assert torch.cuda.current_stream() == s
        x = torch.randn(256, 256, device=dev)
        y = x @ x
    s.synchronize()
    e1.record()
    torch.cuda.current_stream().wait_stream(s)
    y.record_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert e1.query() and 0 < e0.elapsed_time(e1) < 60000
    torch.cuda.reset_peak_memory_stats()
    m0 = torch.cuda.memory_allocated()
    z = torch.empty(1 << 20, device=dev)
    assert torch.cuda.memory_allocated() - m0 == 4 << 20
    del z
    assert torch.cuda.memory_allocated() == m0 and torch.cuda.max_memory_allocated() >= m0 + (
        4 << 20
    )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total and torch.cuda.memory_reserved() <= total - free + (1 << 21)


def test_fresh_memory_is_poisoned():
    x = torch.empty(1000, device=dev)
    assert x.isnan().all()
    x.fill_(1)
    del x
    assert torch.empty(1000, device=dev).isnan().all(), "a reused block is poisoned again"
    assert torch.empty(10, device=dev, dtype=torch.float16).isnan().all()


def test_autograd_thread_and_python_threads():
    seen = []

    class Sq(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            seen.append(threading.get_ident())
            return 2 * ctx.saved_tensors[0] * g

    x = torch.randn(5, device=dev, requires_grad=True)
    Sq.apply(x).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach()) and seen[0] != threading.get_ident()
    out = [None] * 4

    def work(i):
        out[i] = float((torch.ones(100, device=dev) * i).sum())

    ts = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in ts]
    [t.join() for t in ts]
    assert out == [0.0, 100.0, 200.0, 300.0]
    y = torch.utils.checkpoint.checkpoint(lambda t: F.dropout(t.sin(), 0.5), x, use_reentrant=False)
    y.sum().backward()
    torch.autograd.gradcheck(
        lambda t: (t.sin() * t).sum(),
        torch.randn(4, device=dev, dtype=torch.float64, requires_grad=True),
    )


def test_dataloader_pinned():
    ds = torch.utils.data.TensorDataset(torch.arange(20.0))
    for workers in (0, 2):
        got = [
            b[0].to(dev, non_blocking=True)
            for b in torch.utils.data.DataLoader(ds, 8, pin_memory=True, num_workers=workers)
        ]
        assert torch.equal(torch.cat(got).cpu(), torch.arange(20.0))


def test_graphs_unsupported():
    with pytest.raises(RuntimeError, match="graphs are not supported"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(3, device=dev)


def test_oom():
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(3 << 30, dtype=torch.uint8, device=dev)
    assert torch.ones(3, device=dev).sum().item() == 3


@pytest.mark.vgpu_arch(80)
def test_oom_limit_from_env(sub):
    r = sub(
        """
        import torch
        keep = []
        try:
            while True: keep.append(torch.empty(16 << 20, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError: print("count", len(keep))
        """,
        "--mem",
        128,
    )
    assert "count 8" in r.stdout or "count 7" in r.stdout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_16_bit_factors_in_fp32(dtype):
    a, b = torch.randn(2, 5, 7, dtype=dtype), torch.randn(2, 7, 3, dtype=dtype)
    want = a.float() @ b.float()
    out = torch.empty(2, 5, 3, device="cuda")
    torch.bmm(a.cuda(), b.cuda(), out_dtype=torch.float32, out=out)
    torch.testing.assert_close(out.cpu(), want)
    torch.baddbmm(out, a.cuda(), b.cuda(), out_dtype=torch.float32, out=out)
    torch.testing.assert_close(out.cpu(), 2 * want)
