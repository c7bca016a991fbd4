"""`python -m diffclip_hf.search`."""

import sys

from .command import main


sys.exit(main())
