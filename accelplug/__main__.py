"""``python -m accelplug``."""

import sys

from accelplug.cli import main

sys.exit(main())
