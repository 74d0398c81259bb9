"""What the assembler makes of the products' kernels, which no value of theirs shows."""

import pytest

from experiments.benchmarks import listing
from kernels_pallas.choose import target_platform


def test_every_kernel_has_a_name():
  names = list(listing.kernels())
  assert {"rows 32768,512", "dw 2112,7168", "8 groups 7168,2048"} <= set(names)
  assert {"8 BF16 groups 7168,4096", "32 BF16 groups dw 2048,7168"} <= set(names)


@pytest.mark.gpu
@pytest.mark.skipif(target_platform() != "gpu", reason="not on gpu")
@pytest.mark.parametrize(
  "name",
  [
    "rows 7168,2048",
    "rows 32768,512",
    "128 rows 2112,7168",
    "dw 4096,7168",
    "8 groups 7168,2048",
    "8 BF16 groups 7168,4096",
  ],
)
def test_no_spills_and_no_waits(name):
  """A spill or a wait for each product costs up to two thirds of the speed."""
  assert listing.listing(name) == (0, False)
