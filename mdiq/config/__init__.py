"""The operator's topology file: what may stand in it, what is wrong with it, and how one is written."""
