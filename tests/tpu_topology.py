"""Devices of TPU topologies that are not there, to compile for.

libtpu compiles for any topology on a machine without a TPU. It takes a lock as if it
were to use one, which lets one process in at a time; the suite runs several workers,
and none of them touches a TPU.
"""

import os

import jax
import pytest
from jax.experimental import topologies


def devices(name: str) -> list[jax.Device]:
  """The devices of e.g. `v5p:2x2x1`; skips the test where libtpu is not installed."""
  pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: jax[tpu]")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to wait for
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  return topologies.get_topology_desc(name, platform="tpu").devices
