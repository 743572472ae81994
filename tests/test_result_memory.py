"""Large results of the cpu backend take the memory of those freed before; csrc/cpu/result_memory.h.

Scripts run in processes of their own, where no other test has left memory.
"""

import importlib.util
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedmm

MIB = 1 << 20
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("fusedmm._C") is None, reason="extension not built"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="malloc's memory elsewhere"),
]


def _large(mib: float, fill: float = 1.0) -> torch.Tensor:
    """A result of that many MiB, each element `fill`: softmax over one key gives its value."""
    rows = int(mib * MIB) // (4 * 64)
    x, y = torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, 1, 1)
    v_x, v_y = torch.zeros(1, 1, rows, 1), torch.full((1, 1, 1, 64), float(fill))
    return fusedmm.bi_attention(x, y, v_x, v_y, backend="cpu")[0]


def _printed(body: str) -> list[int]:
    """Numbers that a script prints; large is _large, field reads /proc/self/smaps_rollup in MiB."""
    setup = f"""
import sys; sys.path.append({str(pathlib.Path(__file__).parent)!r})
from test_result_memory import _large as large
def field(name):
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(s.split()[1]) // 1024 for s in lines if s.startswith(name + ":"))
large(0.1)
"""
    done = subprocess.run([sys.executable, "-c", setup + body], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_a_freed_result_serves_the_next():
    first = _large(3)
    address = first.data_ptr()
    del first
    assert _large(2.9).data_ptr() == address
    assert _large(2).data_ptr() != address, "a third of it would lie idle"


def test_results_in_use_share_nothing():
    held = [_large(2, fill) for fill in range(8)]
    del held[::2]
    more = [_large(2, fill) for fill in range(8, 12)]
    fills = [1, 3, 5, 7, *range(8, 12)]
    assert all((t == f).all() for t, f in zip([*held, *more], fills, strict=True))


def test_threads_allocate_and_free_at_once():
    def work(fill: int) -> bool:
        return all(bool((_large(1.5, fill + i) == fill + i).all()) for i in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 400, 100)))


def test_a_result_is_a_tensor_like_others():
    """Views keep the memory, storages grow, and other processes can be given it."""
    view = _large(2)[0, 0, 5:]
    _large(2, 3.0)
    assert (view == 1).all()
    t = _large(2)
    t.resize_(t.numel() * 2)
    assert (t[: t.numel() // 2] == 1).all()
    t = _large(2).share_memory_()
    assert t.is_shared() and (t == 1).all()


def test_at_most_256_mib_are_kept_and_64_of_them_not_lent():
    """Of ten results of 40 MiB six stay, five of them lent."""
    kept, lent, held = _printed("""
ten = [large(40) for _ in range(10)]
before = field("Rss")
ten.clear()
print(400 - (before - field("Rss")), field("LazyFree"))
large(48)
print(field("Rss") - field("LazyFree") - (before - 400))
""")
    assert 230 <= kept <= 260, f"{kept} MiB stay"
    assert lent >= 190, f"{lent} MiB are lent"
    assert 40 <= held <= 80, f"{held} MiB are not lent"


def test_what_is_kept_gives_way():
    """An address space with room for one more result only after those of another size are gone."""
    (done,) = _printed("""
import resource
held = [large(40) for _ in range(6)]
held.clear()
with open("/proc/self/statm") as pages:
    taken = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (60 << 20), resource.RLIM_INFINITY))
print(int(bool((large(120) == 1).all())))
""")
    assert done == 1


def test_the_profiler_sees_them():
    with torch.profiler.profile(profile_memory=True) as profile:
        _large(4)
    sizes = [e.self_cpu_memory_usage for e in profile.key_averages()]
    assert max(sizes) >= 4 * MIB
