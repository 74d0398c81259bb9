"""Reads a checkpoint in Hugging Face's format into a workdir.

    python -m experiments.run --config=experiments/configs/import.py \
      --workdir=runs/v2_lite --config.checkpoint.path=FOLDER

Model and tokenizer come from the folder. The workdir then serves generate and export,
and a training run starts from it with `--config.checkpoint.path=runs/v2_lite`.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import Config
from experiments.overrides import to_config_dict


def get_config(variant: str = "default") -> ConfigDict:
  """`default` and `tiny` are the same: the folder says what model it is.

  Raises:
    ValueError: an unknown variant.
  """
  if variant not in ("default", "tiny"):
    raise ValueError(f"import.py has no variant {variant!r}: use default")
  return to_config_dict(Config(job="import"))
