"""From measurements to decisions: who holds which layers, how many Segments a Batch takes. Pure."""
