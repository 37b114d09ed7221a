"""Measurements and pictures for the person who decides. Flags and tables are cli/'s."""
