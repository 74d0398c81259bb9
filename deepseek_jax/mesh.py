"""The device mesh: three named axes, always present.

`pipeline` holds stages of layers, `data` holds replicas, `expert` holds slices of
the routed experts and is a second data axis for everything else (DeepSeek-V3
report, section 3.2: no tensor parallelism).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

PIPELINE, DATA, EXPERT = "pipeline", "data", "expert"
AXES = (PIPELINE, DATA, EXPERT)
BATCH_AXES = (DATA, EXPERT)  # the batch dimension is split over both


def make_mesh(
  pipeline: int = 1,
  data: int = 1,
  expert: int = 1,
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
  """Arranges devices as (pipeline, data, expert), neighbours along `expert`.

  Args:
    pipeline, data, expert: sizes of the axes; their product is the number of
      devices used.
    devices: all devices of all processes when None.

  Raises:
    ValueError: a size below one, or a product that differs from the number of
      devices.
  """
  shape = (pipeline, data, expert)
  if min(shape) < 1:
    raise ValueError(f"mesh sizes must be at least 1, got {dict(zip(AXES, shape))}")
  if devices is None:
    devices = jax.devices()
  needed = pipeline * data * expert
  if needed != len(devices):
    raise ValueError(
      f"mesh pipeline={pipeline} x data={data} x expert={expert} needs {needed} "
      f"devices, but {len(devices)} are present: set config.mesh so that the product "
      f"is {len(devices)}"
    )
  return Mesh(
    np.asarray(devices, dtype=object).reshape(shape), AXES, (AxisType.Auto,) * 3
  )
