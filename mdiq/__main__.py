"""`python -m mdiq`."""

from mdiq.cli.main import main

main()
