"""`python -m vgpu test`: the tests marked gpu, on a real GPU if there is one, else simulated.

The virtual GPU runs them once as sm_80 and once as sm_90, side by side where there are two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import build
from .launcher import environment

TESTS = Path(__file__).resolve().parents[1]
PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def real_gpu() -> str:
    """The name of a GPU that torch can use, or ''."""
    r = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    return r.stdout.strip() if r.returncode == 0 else ""


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m vgpu test",
        description=__doc__,
        epilog="After --: arguments of pytest; without a path, the whole of tests/.",
    )
    p.add_argument(
        "--arch", type=int, choices=(80, 86, 90), action="append", help="default: 80, 90"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--checks", default="all")
    p.add_argument("--virtual", action="store_true", help="even if there is a real GPU")
    p.add_argument("--full", action="store_true", help="also the simulator's long self tests")
    cut = argv.index("--") if "--" in argv else len(argv)
    a, args = p.parse_args(argv[:cut]), argv[cut + 1 :]
    marks = "gpu" if a.full else "gpu and not vgpu_full"
    pytest = [sys.executable, "-m", "pytest", "--durations=8", "-m", marks, *args]
    if not any(Path(x.split("::")[0]).exists() for x in args if not x.startswith("-")):
        pytest.append(str(TESTS))

    name = "" if a.virtual else real_gpu()
    if name:
        print(f"== tests marked gpu on a real GPU: {name}", flush=True)
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env = {**os.environ, "PYTHONPATH": path, "PYTEST_PLUGINS": "vgpu.plugin"}
        return subprocess.call(pytest, env=env)

    t0 = time.monotonic()
    try:
        lib = build.libraries()
    except build.BuildError as e:
        sys.exit(str(e))
    print(f"== no real GPU: virtual GPU built in {time.monotonic() - t0:.0f} s", flush=True)
    archs = a.arch or [80, 90]
    parallel = len(os.sched_getaffinity(0)) >= len(archs) > 1
    codes, waiting = {}, {}
    for arch in archs:
        env = environment(lib, arch, seed=a.seed, checks=a.checks)
        if len(archs) > 1:
            env.setdefault("OMP_NUM_THREADS", "1")
        if parallel and arch != archs[0]:  # the first prints as it goes, the others when done
            log = tempfile.TemporaryFile("w+")
            waiting[arch] = subprocess.Popen(pytest, env=env, stdout=log, stderr=log), log
    for arch in archs:
        print(f"== tests marked gpu on the virtual GPU sm_{arch}, simulated", flush=True)
        if arch in waiting:
            process, log = waiting[arch]
            codes[arch] = process.wait()
            log.seek(0)
            print(log.read(), flush=True)
        else:
            env = environment(lib, arch, seed=a.seed, checks=a.checks)
            codes[arch] = subprocess.call(pytest, env=env)
    for arch, code in codes.items():
        verdict = {0: "passed", 5: "no tests"}.get(code, f"FAILED ({code})")
        print(f"== virtual GPU sm_{arch}, simulated: {verdict}")
    print(f"== {time.monotonic() - t0:.0f} s")
    return max(0 if c == 5 else c for c in codes.values())
