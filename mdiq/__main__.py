"""`python -m mdiq`."""

import sys

if not sys.flags.safe_path:
    # Python put the working directory there; what lies in it is not part of mdiq.
    del sys.path[0]

from mdiq.cli.main import main  # noqa: E402

main()
