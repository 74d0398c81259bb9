"""Whose workdir it is, when nothing says so."""

import pytest

from deepseek_jax.io import workdir
from tests.small_runs import small_config


def test_checkpoints_of_nobody_are_left_alone(tmp_path):
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(ValueError, match="has checkpoints but no config"):
    workdir.check(small_config(), tmp_path)


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path):
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-17").mkdir(parents=True)
  workdir.check(small_config(), tmp_path)
