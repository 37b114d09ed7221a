"""The pure core: values and state machines. No I/O, no clock, no torch; see House in CONTRIBUTING.md."""
