"""python -m vgpu build
python -m vgpu run [--arch 80|86|90] [--seed N] [--checks LIST] [--strict] [--mem MB] -- COMMAND
python -m vgpu test [--arch N] [--seed N] [--full] -- [PYTEST ARGUMENTS]
"""

import argparse
import os
import sys
import time
from pathlib import Path

from . import active, build, library, testing
from .launcher import environment


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m vgpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = p.add_subparsers(dest="cmd", required=True)
    sub.add_parser("build", help="compile the libraries")
    r = sub.add_parser("run", help="run a command on the virtual device")
    arch = int(os.environ.get("VGPU_ARCH", "80"))
    r.add_argument("--arch", type=int, choices=(80, 86, 90), default=arch)
    r.add_argument("--seed", type=int, default=0, help="warp scheduling seed")
    r.add_argument("--checks", default="all", help="all (race, init), none, or race,init,lanes")
    r.add_argument("--strict", action="store_true", help="one guarded allocation per tensor")
    r.add_argument("--mem", type=int, default=0, help="device memory in MiB (default 2048)")
    r.add_argument("command", nargs=argparse.REMAINDER)
    sub.add_parser("test", help="run the tests marked gpu")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["test"]:
        return testing.main(argv[1:])
    a = p.parse_args(argv)

    t0 = time.monotonic()
    try:
        # a device inside a device: the libraries that already run
        lib = library("") if active() and a.cmd == "run" else build.libraries()
    except build.BuildError as e:
        sys.exit(str(e))
    if a.cmd == "build":
        print(f"vgpu: {lib} ({time.monotonic() - t0:.0f} s)")
        return 0
    cmd = a.command[1:] if a.command[:1] == ["--"] else a.command
    if not cmd:
        p.error("no command")
    if cmd[0] == "pytest":
        cmd = [sys.executable, "-m", *cmd]
    elif Path(cmd[0]).name in ("python", "python3") and "/" not in cmd[0]:
        cmd = [sys.executable, *cmd[1:]]
    env = environment(lib, a.arch, seed=a.seed, checks=a.checks, strict=a.strict, mem=a.mem)
    os.execvpe(cmd[0], cmd, env)


if __name__ == "__main__":
    sys.exit(main())
