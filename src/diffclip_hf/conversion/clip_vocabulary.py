"""CLIP's tokenizer from its published merges file, as packages and people have it on disk."""

import gzip
import importlib.util
import itertools
import zlib
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffclip_hf import DiffCLIPTokenizer


VOCABULARY_SIZE = 49408
CONTEXT_LENGTH = 77
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
# Packages that carry the file, by import name.
PACKAGES = ("clip", "open_clip")


def find_merges_file() -> Path:
    """Return the merges file of an installed package, without importing the package.

    Raises:
        FileNotFoundError: No such package is installed.
    """
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / MERGES_FILE
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"CLIP's vocabulary ({MERGES_FILE}) is in none of the packages {', '.join(PACKAGES)}. Install "
        "'diffclip-hf[conversion]', or pass --tokenizer with that file, a tokenizer's folder or a Hub id, or pass "
        "--no-processor."
    )


def clip_tokenizer(merges_file: Path) -> DiffCLIPTokenizer:
    """Return CLIP's tokenizer, cutting at 77 tokens and padding with the end-of-text token.

    Args:
        merges_file: `bpe_simple_vocab_16e6.txt.gz`: a header, then a merge a line, best first, more than CLIP uses.

    Raises:
        ValueError: The file has too few merges, or lines that aren't pairs.
    """
    byte_tokens = list(bytes_to_unicode().values())
    merge_count = VOCABULARY_SIZE - 2 * len(byte_tokens) - 2
    try:
        with gzip.open(merges_file, "rt", encoding="utf-8") as file:
            lines = list(itertools.islice(file, 1, merge_count + 1))
    except (EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{merges_file} can't be read ({error}); fetch it anew.") from error
    merges = [tuple(line.split()) for line in lines]
    known = {*byte_tokens, *(token + "</w>" for token in byte_tokens), *("".join(pair) for pair in merges)}
    if (
        len(merges) != merge_count
        or len(known) != merge_count + 2 * len(byte_tokens)
        or any(len(pair) != 2 or not known.issuperset(pair) for pair in merges)
    ):
        raise ValueError(
            f"{merges_file} doesn't hold CLIP's merges: it must have a header and at least {merge_count} lines of two "
            "symbols that it makes."
        )
    tokens = byte_tokens + [token + "</w>" for token in byte_tokens]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return DiffCLIPTokenizer(
        vocab={token: token_id for token_id, token in enumerate(tokens)},
        merges=merges,
        model_max_length=CONTEXT_LENGTH,
    )
