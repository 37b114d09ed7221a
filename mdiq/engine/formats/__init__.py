"""Model files: GGUF and safetensors, and the packed form that a ring reads."""
