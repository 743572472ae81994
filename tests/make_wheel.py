"""make wheel: builds a wheel and an sdist into dist/, installs each into an empty venv and uses it
there; then compiles a module with AOTInductor, packs and loads it. Not part of the test suite:
every step compiles for minutes.

The venvs find torch by a path to this environment's packages, so that nothing is downloaded;
--online installs it, with all other dependencies, from the index instead.
"""

import argparse
import pathlib
import subprocess
import sys
import sysconfig
import tempfile

import torch
from torch import nn

ROOT = pathlib.Path(__file__).parents[1]
DIST = ROOT / "dist"
USE = """
import pathlib, sys, torch, fusedmm
assert pathlib.Path(fusedmm.__file__).is_relative_to(sys.prefix), fusedmm.__file__
tensors = [torch.randn(2, 3, n, 16, requires_grad=True) for n in (130, 37, 130, 37)]
def run(backend):
    o_x, o_y = fusedmm.bi_attention(*tensors, backend=backend)
    return [o_x, o_y, *torch.autograd.grad(o_x.square().sum() + o_y.sum(), tensors)]
for got, want in zip(run("cpu"), run("reference")):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
print("fusedmm", fusedmm.__version__, "from", fusedmm.__file__)
"""


def call(*command: object, **options: object) -> None:
    """Runs a command and says which one failed."""
    subprocess.run([str(c) for c in command], check=True, **options)


def build(kind: str) -> pathlib.Path:
    """A new wheel or sdist."""
    before = set(DIST.glob("*"))
    for old in before & set(DIST.glob("*.whl" if kind == "wheel" else "*.tar.gz")):
        old.unlink()
    code = "import sys; from setuptools import build_meta as b; "
    code += f"print(b.build_{kind}(sys.argv[1]))"
    call(sys.executable, "-c", code, DIST, cwd=ROOT)
    (made,) = DIST.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def install(package: pathlib.Path, online: bool) -> None:
    """Into an empty venv, and one computation there."""
    with tempfile.TemporaryDirectory() as folder:
        # Without a pip: its setuptools would come before the one that the build asks for.
        call(sys.executable, "-m", "venv", "--without-pip", folder)
        python = pathlib.Path(folder, "bin", "python")
        options = []
        if not online:
            here = sysconfig.get_path("purelib")
            found = subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            pathlib.Path(found.stdout.strip(), "dependencies.pth").write_text(here + "\n")
            options = ["--no-deps", "--no-build-isolation"]
        pip = [sys.executable, "-m", "pip", "--python", python]
        call(*pip, "install", "-q", *options, package, cwd=folder)
        call(python, "-c", USE, cwd=folder)
        call(python, "-m", "fusedmm", "info", cwd=folder)


class Fusion(nn.Module):
    """A fusion attention that returns tensors only."""

    def __init__(self) -> None:
        super().__init__()
        from fusedmm.nn import BiMultiHeadAttention

        self.attention = BiMultiHeadAttention(32, 32, 64, 4)

    def forward(self, v: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (v, _), (t, _) = self.attention(v, t)
        return v, t


@torch.no_grad()
def ahead_of_time() -> None:
    """export, AOTInductor, package, load; another number of tokens than was traced."""
    module, t = Fusion().eval(), torch.randn(2, 13, 32)
    shapes = ({1: torch.export.Dim("tokens", min=2, max=4096)}, None)
    program = torch.export.export(module, (torch.randn(2, 19, 32), t), dynamic_shapes=shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/m.pt2")
        loaded, v = torch._inductor.aoti_load_package(path), torch.randn(2, 31, 32)
        for got, want in zip(loaded(v, t), module(v, t), strict=True):
            torch.testing.assert_close(got, want)
    print("AOTInductor package of a fusion attention: same outputs")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--online", action="store_true")
    parser.add_argument("what", nargs="*", default=["wheel", "sdist", "aoti"])
    args = parser.parse_args()
    DIST.mkdir(exist_ok=True)
    for kind in args.what:
        if kind == "aoti":
            ahead_of_time()
        else:
            install(build(kind), args.online)


if __name__ == "__main__":
    main()
