"""``python -m enginewright`` is ``enginewright``."""

import sys

from enginewright.cli import main

sys.exit(main())
