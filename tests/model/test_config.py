"""The presets have the published sizes and constants, counted from shapes alone."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from deepseek_jax.model import rope
from deepseek_jax.model.layers import named_variables
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.presets import PRESETS, V2, V3


@functools.cache
def sizes(preset: str) -> dict[str, int]:
  """Elements of every tensor by path; stacked layers count together."""
  make = functools.partial(Transformer, PRESETS[preset])
  model = jax.eval_shape(make, jax.random.key(0))
  return {name: math.prod(v.shape) for name, v in named_variables(model).items()}


def total(preset: str, *prefixes: str) -> int:
  return sum(n for name, n in sizes(preset).items() if name.startswith(prefixes))


@pytest.mark.parametrize(
  ("preset", "parameters"),
  [
    # DeepSeek-V3's checkpoint, router biases included, without its MTP layer 61.
    ("v3", 671_026_419_200),
    ("r1", 671_026_419_200),
    # Published as 236B, 15.7B and 16.4B; the digits are our count, once.
    ("v2", 235_741_434_880),
    ("coder_v2", 235_741_434_880),
    ("v2_lite", 15_706_484_224),
    ("coder_v2_lite", 15_706_484_224),
    ("moe_16b", 16_375_728_128),
    # Published as 2B, 1B and 3B.
    ("moe_2b", 1_967_403_520),
    ("lf_1b", 1_050_892_864),
    ("lf_3b", 2_552_794_304),
  ],
)
def test_parameters_of_the_main_model(preset, parameters):
  assert total(preset, "") - total(preset, "mtp") == parameters


def test_parts_of_v3():
  """Against the shapes in the released checkpoint."""
  assert total("v3", "embed", "head", "norm") == 2 * 129280 * 7168 + 7168
  assert total("v3", "dense_blocks.attn.") == 3 * 187_107_328
  assert total("v3", "moe_blocks.attn.") == 58 * 187_107_328
  assert total("v3", "dense_blocks.ffn.") == 3 * 396_361_728
  assert total("v3", "moe_blocks.ffn.") == 58 * 11_320_164_608
  assert total("v3", "moe_blocks.ffn.router.bias") == 58 * 256
  assert total("v3", "moe_blocks.attn_norm", "moe_blocks.ffn_norm") == 58 * 2 * 7168


def test_mtp_module_of_v3():
  """Unique parameters, 11.61B: embedding and head are the main model's."""
  join = 2 * 7168 * 7168 + 2 * 7168
  block = 187_107_328 + 11_320_164_608 + 2 * 7168
  assert total("v3", "mtp") == join + block + 7168 == 11_610_068_224


def test_cache_of_v3_is_576_values_a_token_and_layer():
  assert V3.cache_dim == 576


# Of DeepSeek's `precompute_freqs_cis` at 64 rotated dimensions, base 10,000, factor 40,
# original length 4,096: pairs 0-10 keep their frequency, from 23 on it is a fortieth.
V3_FREQUENCIES = """
1 .74989421 .56234133 .4216965 .31622777 .23713737 .17782794 .13335214 .1 .074989421
.056234133 .039006927 .02687936 .018378146 .012447956 .008334509 .0055 .0035619975
.0022493653 .0013705136 7.9056942e-4 4.149904e-4 1.7782794e-4 3.3338036e-5 2.5e-5
1.8747355e-5 1.4058533e-5 1.0542413e-5 7.9056942e-6 5.9284343e-6 4.4456985e-6
3.3338036e-6
"""


def test_yarn_frequencies_of_v3():
  expected = [float(word) for word in V3_FREQUENCIES.split()]
  config = dataclasses.replace(V3, max_seq_len=163840)
  np.testing.assert_allclose(rope.frequencies(config), expected, rtol=5e-8)


def test_frequencies_without_yarn():
  """DeepSeek leaves YaRN out up to the original length; Hugging Face never does."""
  assert V3.max_seq_len == V3.original_seq_len
  plain = 10000.0 ** -(np.arange(32) / 32)
  np.testing.assert_allclose(rope.frequencies(V3), plain, rtol=1e-14)
  always = dataclasses.replace(V3, yarn="always")
  assert rope.frequencies(always)[-1] == pytest.approx(plain[-1] / 40)


@pytest.mark.parametrize(
  ("config", "scale"), [(V3, 0.1352337788608801), (V2, 0.1147213868)]
)
def test_softmax_scale(config, scale):
  """192^-1/2 (0.1 mscale ln 40 + 1)^2 under YaRN, 192^-1/2 without."""
  extended = dataclasses.replace(config, max_seq_len=163840)
  assert rope.softmax_scale(extended) == pytest.approx(scale, rel=1e-9)
  assert rope.softmax_scale(config) == pytest.approx(192**-0.5)
