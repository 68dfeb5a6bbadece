"""CLIP's byte-level BPE (Radford et al., arXiv 2103.00020), by the library tokenizers.

Its files come from Stable Diffusion's tokenizer/ or from the directory of a CLIP.
"""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tokenizers

from dmd_jax import encoders
from dmd_jax.runtime import storage

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer(NamedTuple):
    """A tokenizer.

    Attributes:
      ids: N texts, a list of str, to int32 [N, length]: start, prefix, text, end, padding. A text
        that is too long is cut before its end token.
      truncated: texts to the indices of those that are cut.
      digest: of everything that the ids follow from.
    """

    ids: Callable
    truncated: Callable
    digest: str


def load(directory: str | os.PathLike, *, length: int = 77, prefix: str = "") -> Tokenizer:
    """Reads the tokenizer of a directory with tokenizer.json, or with vocab.json and merges.txt.

    Padding is the pad token of special_tokens_map.json or tokenizer_config.json: the end token in
    Stable Diffusion 1, "!" in 2.

    Args:
      directory: such as stable-diffusion-v1-5/tokenizer, or clip-vit-large-patch14.
      length: number of tokens, with start, prefix and end.
      prefix: words before every text.

    Raises:
      ValueError: the files are missing, damaged or of another tokenizer.
    """
    directory = storage.local(directory, ("*.json", "merges.txt"))
    try:
        vocabulary, merges = _vocabulary(directory)
        pad = _pad_token(directory)
        bos_id, eos_id, pad_id = (vocabulary[token] for token in (BOS, EOS, pad))
        encoder = _build(vocabulary, merges, pad)
        begin = [bos_id, *encoder.encode(prefix, add_special_tokens=False).ids]
    except Exception as error:  # the library raises plain Exceptions
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{directory}: expected CLIP's tokenizer.json, or its vocab.json and merges.txt, "
            f"got neither ({reason}); set the directory tokenizer/ of a Stable Diffusion "
            "checkpoint, or that of a CLIP, or copy it again."
        ) from error

    def encode(texts):
        encodings = encoder.encode_batch(list(texts), add_special_tokens=False)
        return [[*begin, *encoding.ids, eos_id] for encoding in encodings]

    def ids(texts):
        rows = np.full((len(texts), length), pad_id, np.int32)
        for row, tokens in zip(rows, encode(texts), strict=True):
            if len(tokens) > length:
                tokens = [*tokens[: length - 1], eos_id]
            row[: len(tokens)] = tokens
        return rows

    def truncated(texts):
        return [i for i, tokens in enumerate(encode(texts)) if len(tokens) > length]

    identity = json.dumps([sorted(vocabulary.items()), merges, pad, length, *begin[1:]])
    return Tokenizer(ids, truncated, encoders.digest(identity))


def _build(vocabulary, merges, pad):
    """Returns the pipeline of transformers' CLIPTokenizer, without its template."""
    model = tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=EOS)
    encoder = tokenizers.Tokenizer(model)
    blanks = tokenizers.Regex(r"\s+")
    words = tokenizers.Regex(WORDS)
    normal = tokenizers.normalizers
    split = tokenizers.pre_tokenizers
    encoder.normalizer = normal.Sequence(
        [normal.NFC(), normal.Replace(blanks, " "), normal.Lowercase()]
    )
    encoder.pre_tokenizer = split.Sequence(
        [split.Split(words, "removed", invert=True), split.ByteLevel(add_prefix_space=False)]
    )
    encoder.add_special_tokens(sorted({BOS, EOS, pad}))  # wherever they stand in a text
    return encoder


def _vocabulary(directory):
    """Returns {token: id}, and the pairs to merge in their order."""
    path = directory / "tokenizer.json"
    if path.exists():
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        vocabulary = model["vocab"]
        merges = model["merges"]
    else:
        vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    return vocabulary, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def _pad_token(directory):
    """Returns the token of padding.

    In Stable Diffusion 2 the two files differ, and the first one counts.
    """
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.exists():
            continue
        token = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
        if token:
            return token["content"] if isinstance(token, dict) else token
    return EOS
