"""Completes prompts with the newest checkpoint of a training run.

    python -m experiments.run --config=experiments/configs/generate.py \
      --workdir=runs/tiny --config.generate.prompts='def fibonacci(n):'

The model, its precision and its tokenizer come from the workdir; only `generate.*`
and `seed` are used from here. `--config.generate.checkpoint` names another training
workdir, when `--workdir` is to receive the samples only. Models that were trained to
answer want `--config.generate.chat=template`, which puts prompts into the chat template
of an imported tokenizer, or `thinking`, which opens the answer with `<think>` as well.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import Config, GenerateConfig
from experiments.overrides import to_config_dict

PROMPTS = (
  "def fibonacci(n):\n",
  "import os\nimport sys\n\n\ndef main(",
)


def get_config(variant: str = "default") -> ConfigDict:
  """`default`: 128 tokens a prompt; `tiny`: 16.

  Raises:
    ValueError: an unknown variant.
  """
  lengths = {"default": 128, "tiny": 16}
  if variant not in lengths:
    raise ValueError(
      f"generate.py has no variant {variant!r}: use one of {', '.join(lengths)}"
    )
  generate = GenerateConfig(prompts=PROMPTS, max_new_tokens=lengths[variant])
  return to_config_dict(Config(job="generate", generate=generate))
