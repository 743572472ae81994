"""pytest plugin of `vgpu run` and `vgpu test`: says which GPU a result came from, parts tests.

A finding of the simulator breaks the CUDA context as on hardware; here it is cleared between
tests, and a test that swallowed one fails all the same.
"""

import pytest

import vgpu


def where() -> str:
    """`real GPU: NAME`, or `virtual GPU sm_80, simulated (...)`."""
    if vgpu.active():
        import os

        checks, seed = os.environ["VGPU_CHECKS"], os.environ["VGPU_SEED"]
        return f"virtual GPU sm_{vgpu.arch()}, simulated (checks {checks}, seed {seed})"
    import torch

    if torch.cuda.is_available():
        return f"real GPU: {torch.cuda.get_device_name()}"
    return "no GPU, neither real nor virtual"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vgpu_arch(sm): a self test for one architecture")


def pytest_report_header() -> str:
    return f"gpu: {where()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(where())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item):
    if vgpu.active():
        vgpu.reset()
        vgpu.clear()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item):
    result = yield
    if vgpu.active() and vgpu.sticky():
        report = vgpu.report()
        vgpu.reset()
        pytest.fail(f"a launch of this test broke a rule of the virtual GPU:\n{report}", False)
    return result
