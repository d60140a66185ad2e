"""Our networks against the golden files that `make parity` wrote from torch's: needs no torch."""

import numpy as np
import parity_harness as harness
import pytest


@pytest.mark.parametrize('case', [c for c in harness.cases() if c.golden], ids=lambda case: case.name)
def test_equals_the_origin(case):
    module, variables, inputs = harness.created(case)
    ours = harness.evaluated(module, variables, inputs)
    with np.load(harness.golden_path(case)) as golden:
        for name in golden:
            expected = golden[name]
            assert harness.error(harness.sample(ours[name]), expected) <= 2 * case.tolerance, name
