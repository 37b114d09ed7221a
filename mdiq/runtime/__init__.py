"""The loops and processes that join engine, transport and protocols."""
