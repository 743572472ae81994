"""Loaded at interpreter start in a vgpu process: hooks torch and Triton when they are imported."""

import os
import sys

if os.environ.get("VGPU_ACTIVE") == "1":
    import importlib.abc
    import importlib.machinery

    class _Loader(importlib.abc.Loader):
        def __init__(self, inner, name):
            self.inner, self.name = inner, name

        def create_module(self, spec):
            return self.inner.create_module(spec)

        def exec_module(self, module):
            self.inner.exec_module(module)
            from vgpu import hooks

            hooks.AFTER[self.name](module)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class _Finder(importlib.abc.MetaPathFinder):
        want = {
            "torch",
            "triton.backends.nvidia.compiler",
            "triton.backends.nvidia.driver",
            "triton.compiler.compiler",
            "torch._inductor.runtime.benchmarking",
        }

        def find_spec(self, name, path, target=None):
            if name not in self.want:
                return None
            self.want.discard(name)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None:
                spec.loader = _Loader(spec.loader, name)
            return spec

    sys.meta_path.insert(0, _Finder())

# the sitecustomize that this one hides, if any
for _p in list(sys.path):
    _f = os.path.join(_p, "sitecustomize.py")
    if os.path.isfile(_f) and os.path.realpath(_f) != os.path.realpath(__file__):
        with open(_f) as _source:
            exec(compile(_source.read(), _f, "exec"), {"__name__": "sitecustomize", "__file__": _f})
        break
