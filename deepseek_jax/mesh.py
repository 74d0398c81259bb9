"""The device mesh: four named axes, always present.

`pipeline` holds stages of layers, `data` holds replicas, `node` and `expert` together
hold slices of the routed experts and are more data axes for everything else
(DeepSeek-V3 report, section 3.2: no tensor parallelism). Devices along `expert` are
those of one fast network, NVLink for example; tokens for experts elsewhere first cross
to another `node`, once each (section 3.2.2). A `node` of 1 is the flat form.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

PIPELINE, DATA, NODE, EXPERT = "pipeline", "data", "node", "expert"
AXES = (PIPELINE, DATA, NODE, EXPERT)
EXPERT_AXES = (NODE, EXPERT)  # routed experts are split over both
BATCH_AXES = (DATA, *EXPERT_AXES)  # and the batch dimension over all three


def make_mesh(
  pipeline: int = 1,
  data: int = 1,
  expert: int = 1,
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
  *,
  node: int = 1,
) -> Mesh:
  """Arranges devices as (pipeline, data, node, expert), neighbours along `expert`.

  Args:
    pipeline, data, expert, node: sizes of the axes; their product is the number of
      devices used.
    devices: all devices of all processes when None.

  Raises:
    ValueError: a size below one, or a product that differs from the number of
      devices.
  """
  shape = (pipeline, data, node, expert)
  if min(shape) < 1:
    raise ValueError(f"mesh sizes must be at least 1, got {dict(zip(AXES, shape))}")
  if devices is None:
    devices = jax.devices()
  needed = math.prod(shape)
  if needed != len(devices):
    raise ValueError(
      f"mesh pipeline={pipeline} x data={data} x node={node} x expert={expert} needs "
      f"{needed} devices, but {len(devices)} are present: set config.mesh so that the "
      f"product is {len(devices)}"
    )
  return Mesh(
    np.asarray(devices, dtype=object).reshape(shape), AXES, (AxisType.Auto,) * len(AXES)
  )


def split_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes that routed experts are really split over: those longer than 1."""
  return tuple(axis for axis in EXPERT_AXES if mesh.shape[axis] > 1)
