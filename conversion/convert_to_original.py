"""Write a converted folder's weights in the original's format; see --help.

The same as `python -m diffclip_hf.conversion.convert_to_original`.
"""

import sys

from diffclip_hf.conversion.convert_to_original import main


if __name__ == "__main__":
    sys.exit(main())
