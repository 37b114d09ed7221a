"""The parts of a model and how a Stage runs them: Layers, KV cache, sampler."""
