"""What patch puts into Grounding DINO, under DDP and FSDP2 on two gloo ranks: the gradients of one
process. Built without Transformers, whose import would be most of the test's time."""

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fusedmm.nn import BiMultiHeadAttention

B, M, N, D, WORLD = 4, 19, 13, 32, 2


class Model(nn.Module):
    """Two fusion attentions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(BiMultiHeadAttention(D, D, 48, 4) for _ in range(2)).eval()

    def forward(self, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            (v, _), (t, _) = layer(v, t)
        return v.square().mean((1, 2)) + t.square().mean((1, 2))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, M, D, generator=g), torch.randn(B, N, D, generator=g)


def grads(model: nn.Module, v: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(v, t).mean().backward()
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    mine = [s.chunk(WORLD)[rank] for s in data()]
    results = {"ddp": grads(nn.parallel.DistributedDataParallel(Model()), *mine)}
    for name, inner in (("layers", False), ("every Linear", True)):
        model = Model()
        for layer in model.layers:
            for linear in layer.children() if inner else ():
                fully_shard(linear)
            fully_shard(layer)
        fully_shard(model)
        results[name] = grads(model, *mine)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_and_fsdp2(tmp_path) -> None:
    want = grads(Model(), *data())
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "fusedmm"])
    mp.start_processes(worker, (str(tmp_path),), nprocs=WORLD, start_method="forkserver")
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert set(results) == {"ddp", "layers", "every Linear"}
        for got in results.values():
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
