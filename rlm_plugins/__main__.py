"""`python -m rlm_plugins` is `rlm-plugins`."""

import sys

from .cli import main

sys.exit(main())
