"""Kernels for GPU and TPU beside their plain meaning: a folder an operation.

Imports jax and numpy only. Every operation has `reference.py` (plain jnp in FP32: the
meaning of the operation) and implementations that keep the same contract.
"""
