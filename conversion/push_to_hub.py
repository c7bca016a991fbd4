"""Upload a converted folder to the Hub; see --help.

The same as `python -m diffclip_hf.conversion.push_to_hub`.
"""

import sys

from diffclip_hf.conversion.push_to_hub import main


if __name__ == "__main__":
    sys.exit(main())
