"""``python -m polylora``."""

import sys

from polylora.cli import main

sys.exit(main())
