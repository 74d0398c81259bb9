"""The flags by which several processes (hosts) become one run, and their joining.

Every process gets the same command. Which one it is, of how many, SLURM, Open MPI,
Kubernetes, GKE or Cloud TPU say with `--distributed`; elsewhere three flags do.
"""

import json
import logging
from typing import TYPE_CHECKING

from absl import flags

from deepseek_jax.config import Config
from deepseek_jax.io.plain import to_dict
from deepseek_jax.io.workdir import flatten
from deepseek_jax.meeting import Place

if TYPE_CHECKING:
  from deepseek_jax.processes import Group

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "one of several processes: SLURM, GKE or Cloud TPU says which"
)
_PLACE = {
  "coordinator": flags.DEFINE_string(
    "coordinator", None, "one of several processes: HOST:PORT of process 0, a free port"
  ),
  "processes": flags.DEFINE_integer("processes", None, "how many there are"),
  "process": flags.DEFINE_integer("process", None, "which one this is, from 0"),
}
_JOIN_TIMEOUT = flags.DEFINE_integer(
  "join_timeout", 300, "seconds to wait until all processes have come", lower_bound=1
)
_PEER_TIMEOUT = flags.DEFINE_integer(
  "peer_timeout", 100, "seconds of silence after which a process is dead", lower_bound=2
)


def join(job: str) -> "Group | None":
  """Joins the other processes, if the flags say that there are some.

  Raises:
    ValueError: flags that do not fit together, processes that did not come, or a
      process with other settings: one line.
  """
  given = {name: flag.value for name, flag in _PLACE.items() if flag.value is not None}
  if not given and not _DISTRIBUTED.value:
    return None
  if job == "export":
    raise ValueError("job=export is for one process: leave the flags of several out")
  if given and len(given) < len(_PLACE):
    absent = ", ".join(f"--{name}" for name in _PLACE if name not in given)
    raise ValueError(
      f"missing {absent}: --coordinator, --processes and --process belong together; "
      "--distributed alone finds them in the environment"
    )
  place = Place(**given) if given else None
  from deepseek_jax.processes import Group  # imports JAX

  group = Group(place, _JOIN_TIMEOUT.value, _PEER_TIMEOUT.value)
  if group.process:
    logging.getLogger("deepseek_jax").setLevel(logging.WARNING)
  return group


def check_same(config: Config, group: "Group") -> None:
  """Refuses, in all processes, to run one with other settings than process 0.

  Raises:
    ValueError: they differ; the settings are named.
  """
  ours = json.dumps(to_dict(config))
  theirs = group.value_of_first("config", ours)
  old, new = flatten(json.loads(theirs)), flatten(json.loads(ours))
  differing = [
    f"{key} is {old.get(key)!r} in process 0 and {new.get(key)!r} there"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
  fault = group.shared_fault(
    f"process {group.process} has other settings: {'; '.join(differing)}: give all "
    "processes the same command"
    if differing
    else None
  )
  if fault:
    raise ValueError(fault)
