"""`python -m tpcheck` is `tpcheck`."""

import sys

from tpcheck.cli import main

sys.exit(main())
