"""A small byte-level BPE vocabulary in CLIP's format, trained on the emoji's names."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffclip_hf import DiffCLIPTokenizer


START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], merge_count: int, context_length: int) -> DiffCLIPTokenizer:
    """Return a CLIP tokenizer whose merges are learned from `texts`.

    As in CLIP's own vocabulary the ids are the bytes, the bytes at a word's end, the merges, start of text, and last
    end of text; text is lower-cased, and cut at `context_length` tokens.

    Args:
        texts: What to learn the merges from.
        merge_count: How many merges, of which the vocabulary has 514 tokens more.
        context_length: The most tokens of a text, those of its start and end among them.

    Source: Sennrich et al. 2016 for the merges; Radford et al. 2021 (CLIP) for the format.
    """
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = byte_tokens + [token + "</w>" for token in byte_tokens]
    # CLIP's own lower-casing and word splitting, from a tokenizer that has no merges yet.
    empty = CLIPTokenizer(vocab={token: index for index, token in enumerate([*base, START, END])}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = empty.backend_tokenizer.normalizer
    learner.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + merge_count,
        # Given as special tokens they have their ids beforehand, by which ties between equally frequent pairs are
        # broken; otherwise ids, and with them the merges, would differ from run to run.
        special_tokens=base,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # Two merges may make the same token.
    tokens = list(dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END]))
    return DiffCLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=context_length
    )
