"""``python -m toolchain`` is ``enginewright``."""

import sys

from toolchain.cli import main

sys.exit(main())
