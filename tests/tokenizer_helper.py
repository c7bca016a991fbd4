"""A CLIP tokenizer of 514 tokens, without any merge: a token a byte."""

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


# What a text tower's configuration has to have for it.
BYTES = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}


def tiny_clip_tokenizer(tokenizer_class: type[CLIPTokenizer] = CLIPTokenizer, **kwargs) -> CLIPTokenizer:
    """Return a tokenizer for every text; `kwargs` go to the class, `model_max_length` is 77 unless among them.

    Each byte is a token, with the end-of-word variant after each word, the start token is 512 and the end token 513.
    """
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    return tokenizer_class(vocab=vocabulary, merges=[], **{"model_max_length": 77} | kwargs)
