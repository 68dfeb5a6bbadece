"""WordLlama's static token vectors (https://github.com/dleemiller/WordLlama), for small networks.

Their files come with the package wordllama.
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
    """Returns the encoder of token vectors plus sinusoidal codes of their positions.

    The codes are those of Vaswani et al., arXiv 1706.03762, section 3.5. The sum has unit variance,
    and zeros follow the last token. The first row is the start token's for every prompt; the empty
    prompt has no other.

    Args:
      parallel: the devices, which a table does not need.
      length: number of tokens, with the start.
      dim: channels, even, up to 256; the vectors are trained so that the first ones suffice.

    Raises:
      ValueError: the package is not installed or has another version, or the sizes are impossible.
    """
    if length < 2 or not 2 <= dim <= 256 or dim % 2:
        raise ValueError(
            "wordllama: expected a length of at least 2 and an even dim up to 256, "
            f"got {length} and {dim}; use 16 and 256."
        )
    words = tokenizers.Tokenizer.from_file(str(_installed(*VOCABULARY)))
    table = safetensors.load_file(_installed(*WEIGHTS))["embedding.weight"]
    table = table[:, :dim].astype(np.float32)
    table /= np.sqrt(np.mean(table**2))
    codes = _codes(length, dim)

    def encode(prompts):
        rows = np.zeros((len(prompts), length, dim), np.float32)
        for row, tokens in zip(rows, words.encode_batch(list(prompts)), strict=True):
            ids = tokens.ids[:length]
            vectors = table[ids] + codes[: len(ids)]
            row[: len(ids)] = vectors / np.sqrt(1.5)  # variances of 1 and 1/2
        return rows

    def truncated(prompts):
        rows = words.encode_batch(list(prompts))
        return [i for i, tokens in enumerate(rows) if len(tokens.ids) > length]

    digest = encoders.digest(f"wordllama {WEIGHTS} {VOCABULARY} {length} {dim}")
    return encoders.Encoder(encode, (length, dim), digest, truncated)


def _codes(length, dim):
    """Returns the codes of the positions, [L, D]."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, dim, 2) / dim)
    codes = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return codes.reshape(length, dim).astype(np.float32)


def _installed(name, sha256):
    """Returns the path of a file of the package.

    The package is not imported, because it would look for its files on the network.
    """
    spec = importlib.util.find_spec(PACKAGE)
    command = "pip install wordllama==0.4.0.post1"
    if not spec:
        raise ValueError(f"WordLlama's vectors need a package; run: {command}")
    path = pathlib.Path(spec.origin).parent / name
    actual = published.sha256(path)[:8] if path.exists() else "no file"
    if actual != sha256[:8]:
        raise ValueError(
            f"{path}: expected a SHA-256 of {sha256[:8]}..., got {actual}; run: {command}"
        )
    return path
