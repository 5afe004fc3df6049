"""`python -m mone_export` is `mone-export`."""

import sys

from mone_export.cli import main

sys.exit(main())
