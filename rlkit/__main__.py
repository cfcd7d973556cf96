"""`python -m rlkit` is the same as `rlkit`."""

import sys

from rlkit.cli import main

sys.exit(main())
