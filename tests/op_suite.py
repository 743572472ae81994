"""The tests that all four ops must pass, as a class that attention_suite.py and pair_loss_suite.py
subclass, and those the test files of the ops. `params` are tables that conftest.py turns into
parameters.
"""

from typing import Any, ClassVar

import harness
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedmm import testing
from fusedmm.testing import Case, fused, make_case

DTYPES = {str(d).removeprefix("torch."): d for d in testing.DTYPES}


class OpSuite:
    """Needs `op`, `params`, `small` (a shape above one tile would be waste) and `tiny`."""

    op: str
    small: Any
    tiny: Any
    params: ClassVar[dict[str, dict[str, Any]]]
    # Options with which gradient formulas differ; the first entry serves where one is enough.
    defaults: ClassVar[dict[str, Any]] = {}

    def case(self, shape: Any = None, dtype: torch.dtype = torch.float32, **features: Any) -> Case:
        """A case of this op, of shape `small` unless given."""
        return make_case(self.op, shape or self.small, dtype, **{**self.defaults, **features})

    def test_matches_oracle(self, backend, device, shape, dtype):
        harness.check_oracle(self.case(shape, dtype, device=device), backend)

    def test_matches_oracle_with_features(self, backend, device, features, dtype):
        features = dict(features)
        shape = features.pop("shape", self.small)
        harness.check_oracle(self.case(shape, dtype, device=device, **features), backend)

    def test_gradcheck_reference(self, features):
        features = {k: v for k, v in features.items() if k not in ("shape", "bias")}
        features = {"gain": 1.0, **features} if self.op in testing.ATTENTIONS else features
        harness.check_gradcheck(self.case(self.tiny, torch.float64, **features))

    def test_opcheck(self, backend, device):
        harness.check_opcheck(self.case(device=device), backend)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles(self, backend, device, dynamic):
        harness.check_compiles(self.case(device=device), backend, "aot_eager", dynamic)

    def test_compiles_with_inductor(self, backend, device):
        harness.check_compiles(self.case(device=device), backend, "inductor", None)

    def test_compiles_once_for_all_sizes(self, backend, device, sizes):
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in sizes:
            case = harness.accepted(self.case(shape, device=device), backend)
            with torch._dynamo.config.patch(error_on_recompile=shape != sizes[0]):
                got = testing.values_and_grads(lambda c: compiled(c, backend), case)
            harness.assert_same(got, harness.run(case, backend))

    def test_exports(self, backend, device):
        harness.check_export(self.case(device=device), backend)

    def test_meta(self):
        harness.check_meta(self.case())

    @pytest.mark.parametrize("layout", harness.LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_strided_inputs(self, backend, device, layout, dtype):
        harness.check_strided(self.case(dtype=dtype, device=device), backend, layout)

    def test_deterministic(self, backend, device, big, dtype):
        harness.check_deterministic(self.case(big, dtype, device=device), backend)

    def test_threads_agree(self, backend, device, big):
        harness.check_threads(self.case(big, device=device), backend)

    def test_inputs_untouched(self, backend, device):
        harness.check_inputs_untouched(self.case(device=device), backend)

    def test_only_wanted_gradients(self, backend, device):
        harness.check_needs(self.case(device=device), backend)

    def test_double_backward_raises(self, backend, device):
        harness.check_double_backward(self.case(device=device), backend)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_autocast(self, backend, device, dtype):
        harness.check_autocast(self.case(device=device), backend, dtype)

    def test_saved_bytes_are_linear(self, backend, device, doubling):
        once, twice = (
            harness.saved_bytes(harness.accepted(self.case(s, device=device), backend), backend)
            for s in doubling
        )
        assert once <= twice <= 2.05 * once + 256

    def test_checkpointing(self, backend, device):
        case = harness.accepted(self.case(device=device), backend)
        want = harness.run(case, backend)
        got = testing.values_and_grads(
            lambda c: checkpoint(fused, c, backend, use_reentrant=False), case
        )
        harness.assert_same(got, want)
