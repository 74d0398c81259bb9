"""DeepSeek-V3 and R1 in JAX: model, training, generation."""
