"""Writes the newest weights of a workdir for other programs.

    python -m experiments.run --config=experiments/configs/export.py \
      --workdir=runs/tiny --config.checkpoint.path=FOLDER

`checkpoint.format` is `hf` (safetensors for transformers, vLLM, SGLang), `orbax` (plain
arrays for other JAX projects) or `maxtext`; `checkpoint.dtype` the type of the weights.
`generate.checkpoint` names the workdir to export from, where `--workdir` is another.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import Config
from experiments.overrides import to_config_dict


def get_config(variant: str = "default") -> ConfigDict:
  """`default` and `tiny` are the same: the workdir says what model it is.

  Raises:
    ValueError: an unknown variant.
  """
  if variant not in ("default", "tiny"):
    raise ValueError(f"export.py has no variant {variant!r}: use default")
  return to_config_dict(Config(job="export"))
