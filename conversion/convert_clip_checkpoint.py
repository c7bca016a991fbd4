"""Turn a CLIPModel of Transformers into a DiffCLIPModel, or back; see --help.

The same as `python -m diffclip_hf.conversion.convert_clip_checkpoint`.
"""

import sys

from diffclip_hf.conversion.convert_clip_checkpoint import main


if __name__ == "__main__":
    sys.exit(main())
