"""Places redundant experts by the loads of a training run (EPLB), for generation.

    python -m experiments.run --config=experiments/configs/rebalance.py \
      --workdir=runs/v3 --config.rebalance.gpus=32 --config.rebalance.nodes=4

The model, its data and the groups of its experts come from the workdir. Loads are
measured on validation data: `train.eval_batches` global batches to place experts by,
and as many after them to judge the placement. Leaves placement.json, which generate
takes as `--config.generate.placement`, and plots/gpu_load.png.
`--config.generate.checkpoint` names the training workdir, when `--workdir` is to
receive these files only.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import Config, RebalanceConfig, TrainConfig
from experiments.overrides import to_config_dict


def get_config(variant: str = "default") -> ConfigDict:
  """`default`: V3's prefilling unit; `tiny`: two nodes of four GPUs.

  Raises:
    ValueError: an unknown variant.
  """
  if variant == "tiny":
    config = Config(
      job="rebalance",
      rebalance=RebalanceConfig(redundant_experts=8, nodes=2, gpus=8),
      train=TrainConfig(micro_batch_size=16),
    )
  elif variant == "default":
    config = Config(job="rebalance")
  else:
    raise ValueError(f"rebalance.py has no variant {variant!r}: use default or tiny")
  return to_config_dict(config)
