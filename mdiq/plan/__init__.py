"""From measurements to decisions: which Node holds which layers, how many Segments a Batch takes. Pure."""
