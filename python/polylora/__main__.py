"""``python -m polylora``."""

import sys

from polylora_cli import main

sys.exit(main())
