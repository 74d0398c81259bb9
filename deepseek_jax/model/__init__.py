"""The DeepSeek models as Flax NNX modules: mathematics only."""
