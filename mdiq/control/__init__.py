"""The control plane: who is in the Ring and what each Node holds. Activations never pass here."""
