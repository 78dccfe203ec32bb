"""`python -m tpcheck` is `tpcheck`."""

import sys

from tpcheck.errors import missing_package

try:
    from tpcheck.cli import main
except ModuleNotFoundError as error:  # of the command line's own: click, where a job's Python is not the right one
    if not (message := missing_package(error)):
        raise
    print("tpcheck: error:", message, file=sys.stderr)
    sys.exit(2)

sys.exit(main())
