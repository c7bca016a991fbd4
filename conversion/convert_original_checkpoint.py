"""Convert a checkpoint of the original code into a folder for Transformers; see --help.

The same as `python -m diffclip_hf.conversion.convert_original_checkpoint`.
"""

import sys

from diffclip_hf.conversion.convert_original_checkpoint import main


if __name__ == "__main__":
    sys.exit(main())
