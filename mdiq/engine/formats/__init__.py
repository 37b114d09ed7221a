"""Files of models: GGUF and safetensors, what they hold, and the packed form that a ring reads."""
