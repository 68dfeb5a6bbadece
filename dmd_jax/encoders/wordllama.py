"""WordLlama's static token vectors (https://github.com/dleemiller/WordLlama), whose files arrive by
pip: words for small networks.
"""

import importlib.util
import pathlib

import numpy as np
import tokenizers
from safetensors import numpy as safetensors

from dmd_jax import encoders
from dmd_jax.weights import published

PACKAGE = "wordllama"
WEIGHTS = (
    "weights/l2_supercat_256.safetensors",
    "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
)
VOCABULARY = (
    "tokenizers/l2_supercat_tokenizer_config.json",
    "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
)


def make(parallel, *, length: int = 16, dim: int = 256) -> encoders.Encoder:
    """Token vectors plus sinusoidal codes of their positions (Vaswani et al., arXiv 1706.03762,
    3.5), of unit variance; then zeros.

    The first row is that of the start token, whatever the prompt; the empty prompt has no other.

    Args:
      parallel: the devices; a table needs none.
      length: tokens, with the start.
      dim: channels, even, up to 256; the vectors are trained so that the first ones do alone.

    Raises:
      ValueError: the package is not installed, or in another version; no such size.
    """
    if length < 2 or not 2 <= dim <= 256 or dim % 2:
        raise ValueError(
            f"wordllama: expected a length of at least 2 and an even dim up to 256, got {length} "
            f"and {dim}; use 16 and 256."
        )
    words = tokenizers.Tokenizer.from_file(str(_installed(*VOCABULARY)))
    table = safetensors.load_file(_installed(*WEIGHTS))["embedding.weight"][:, :dim].astype(
        np.float32
    )
    table /= np.sqrt(np.mean(table**2))
    codes = _codes(length, dim)

    def encode(prompts):
        rows = np.zeros((len(prompts), length, dim), np.float32)
        for row, tokens in zip(rows, words.encode_batch(list(prompts)), strict=True):
            ids = tokens.ids[:length]
            # 1 + 1/2, the variances.
            row[: len(ids)] = (table[ids] + codes[: len(ids)]) / np.sqrt(1.5)
        return rows

    def truncated(prompts):
        return [
            i
            for i, tokens in enumerate(words.encode_batch(list(prompts)))
            if len(tokens.ids) > length
        ]

    return encoders.Encoder(
        encode,
        (length, dim),
        encoders.digest(f"wordllama {WEIGHTS} {VOCABULARY} {length} {dim}"),
        truncated,
    )


def _codes(length, dim):
    """[L, D]"""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, dim, 2) / dim)
    return (
        np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, dim).astype(np.float32)
    )


def _installed(name, sha256):
    """The file of the package, which is not imported: it would look for its files on the network."""
    spec = importlib.util.find_spec(PACKAGE)
    how = "pip install wordllama==0.4.0.post1"
    if not spec:
        raise ValueError(f"WordLlama's vectors need a package; run: {how}")
    path = pathlib.Path(spec.origin).parent / name
    got = published.sha256(path)[:8] if path.exists() else "no file"
    if got != sha256[:8]:
        raise ValueError(f"{path}: expected a SHA-256 of {sha256[:8]}..., got {got}; run: {how}")
    return path
