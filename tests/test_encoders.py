"""Tokens as CLIP has them, and the encoders of text."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from dmd_jax import lookup, sharding
from dmd_jax.encoders import clip, tokenizer, wordllama
from tests import test_features

# {pair to merge: id of the result}, in order: those of CLIP's 48,894 merges that happen in the
# golden texts.
MERGES = json.loads(
    (pathlib.Path(__file__).parent / "data" / "clip_merges.json").read_text(encoding="utf-8")
)
GOLDEN = {
    "A photo of a cat": [320, 1125, 539, 320, 2368],
    "": [],
    "a  photograph,  of AN astronaut riding a horse!!": [
        320,
        8853,
        267,
        539,
        550,
        18376,
        6765,
        320,
        4558,
        748,
    ],
    "café naïve 😀 你好": [15304, 1097, 35689, 563, 7334, 47466, 254, 29290, 377],
    "it's we'll 1234 $5.00": [585, 568, 649, 1342, 272, 273, 274, 275, 259, 276, 269, 271, 271],
}
NASTY = [
    *GOLDEN,
    "<|endoftext|> a <|STARTOFTEXT|>b<|startoftext|>c<|endoftext|>cat",
    "  \t\n x\u3000y\u200bz\x00\ufeff",
    "İstanbul ǅ ß ﬁ ½²③ ٣٤ 𝒳 e\u0301 é",
    "''s 's'S they'RE don't it’s !!! ! cat! ...---===$$$",
    "👩‍👩‍👧 🇫🇷 日本語テスト",
    "a" * 300,
    "photo " * 90,
    "#version: 0.2",
]


def vocabulary():
    """CLIP's, of what the golden texts need."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_ = [chr(b) for b in visible] + [
        chr(256 + i) for i in range(256 - len(visible))
    ]  # GPT-2's names of the bytes
    ids = {token: i for i, token in enumerate([*bytes_, *(b + "</w>" for b in bytes_)])}
    return (
        ids
        | {pair.replace(" ", ""): i for pair, i in MERGES.items()}
        | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    )


def write(path, layout="files", **configs):
    """A tokenizer/ directory."""
    path.mkdir(parents=True, exist_ok=True)
    if layout == "files":
        (path / "vocab.json").write_text(json.dumps(vocabulary()))
        (path / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8"
        )
    else:
        merges = [pair.split(" ") if layout == "pairs" else pair for pair in MERGES]
        (path / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "model": {"vocab": vocabulary(), "merges": merges}})
        )
    for name, config in configs.items():
        (path / f"{name}.json").write_text(json.dumps(config))
    return path


# tokens


@pytest.mark.parametrize("layout", ["files", "pairs", "lines"])
def test_golden_ids(tmp_path, layout):
    tokens = tokenizer.load(write(tmp_path, layout))
    ids = tokens.ids(list(GOLDEN))
    assert ids.shape == (5, 77) and ids.dtype == np.int32
    for row, expected in zip(ids, GOLDEN.values(), strict=True):
        np.testing.assert_array_equal(row, [49406, *expected, *[49407] * (76 - len(expected))])
    assert (
        tokens.truncated(list(GOLDEN)) == []
        and tokens.digest == tokenizer.load(write(tmp_path / "b")).digest
    )


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_same_as_transformers(tmp_path, pad):
    transformers = pytest.importorskip("transformers")
    tokens = tokenizer.load(write(tmp_path, special_tokens_map={"pad_token": pad}))
    reference = transformers.CLIPTokenizer(
        vocab=vocabulary(), merges=[tuple(pair.split(" ")) for pair in MERGES], pad_token=pad
    )
    expected = reference(NASTY, padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(tokens.ids(NASTY), expected)


def test_too_long(tmp_path):
    tokens = tokenizer.load(write(tmp_path))
    texts = ["cat " * 75, "cat " * 76, "", "cat " * 500]
    assert tokens.truncated(texts) == [1, 3]
    np.testing.assert_array_equal(
        tokens.ids(texts)[[0, 1, 3]], np.tile([49406, *[2368] * 75, 49407], (3, 1))
    )
    short = tokenizer.load(tmp_path, length=4)
    np.testing.assert_array_equal(
        short.ids(["A photo of a cat", ""]),
        [[49406, 320, 1125, 49407], [49406, 49407, 49407, 49407]],
    )
    assert (
        short.truncated(["A photo of a cat", "a cat", ""]) == [0] and short.digest != tokens.digest
    )


def test_padding(tmp_path):
    """Stable Diffusion 2 pads with "!", as one of two files says."""
    sd1 = write(
        tmp_path / "1", tokenizer_config={"pad_token": "<|endoftext|>"}, special_tokens_map={}
    )
    sd2 = write(
        tmp_path / "2",
        tokenizer_config={"pad_token": "<|endoftext|>"},
        special_tokens_map={"pad_token": {"content": "!"}},
    )
    only = write(tmp_path / "3", tokenizer_config={"pad_token": "!"})
    loaded = [tokenizer.load(path) for path in (sd1, sd2, only)]
    assert [t.ids([""])[0, -1] for t in loaded] == [49407, 0, 0]
    assert loaded[0].digest != loaded[1].digest == loaded[2].digest


def without(name):
    return {token: i for token, i in vocabulary().items() if token != name}


@pytest.mark.parametrize(
    ("files", "reason"),
    {
        "nothing": ({}, r"No such file or directory: '.*vocab\.json'"),
        "json": ({"tokenizer.json": "{"}, "JSONDecodeError"),
        "another kind": (
            {"tokenizer.json": '{"model": {"type": "Unigram", "vocab": [["a", 1.0]]}}'},
            "KeyError: 'merges'",
        ),
        "no end": (
            {"vocab.json": json.dumps(without("<|endoftext|>")), "merges.txt": "\n".join(MERGES)},
            r"KeyError: '<\|endoftext\|>'",
        ),
        "no result": (
            {"vocab.json": json.dumps(without("cat</w>")), "merges.txt": "\n".join(MERGES)},
            "cat</w>",
        ),
        "three": ({"vocab.json": json.dumps(vocabulary()), "merges.txt": "a b c"}, "got neither"),
        "pad": ({"tokenizer_config.json": '{"pad_token": "[PAD]"}'}, r"KeyError: '\[PAD\]'"),
    }.values(),
)
def test_another_tokenizer(tmp_path, files, reason):
    if "tokenizer_config.json" in files:
        write(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=(
            rf"expected CLIP's tokenizer\.json, or its vocab\.json and merges\.txt, "
            rf"(.|\n)*{reason}"
        ),
    ):
        tokenizer.load(tmp_path)


# CLIP


def test_clip_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    test_features.import_torchvision()  # transformers does, too
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    reference = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**sizes, hidden_act="quick_gelu", eos_token_id=2)
    ).eval()
    reference.save_pretrained(tmp_path / "text_encoder")
    write(tmp_path / "tokenizer")
    parallel = sharding.Parallel(sharding.make_mesh())
    encoder = clip.make(parallel, checkpoint=str(tmp_path), batch_size=8)
    texts = [*NASTY, "photo of a cat"]
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokenizer.load(tmp_path / "tokenizer").ids(texts))
        ).last_hidden_state.numpy()
    got = encoder.encode(texts)
    assert got.dtype == np.float32 and encoder.shape == got.shape[1:] == (77, 32)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert encoder.truncated(texts) == [texts.index("a" * 300), texts.index("photo " * 90)]
    one = clip.make(
        sharding.Parallel(sharding.make_mesh(devices=jax.devices()[:1])),
        checkpoint=tmp_path,
        batch_size=3,
    )
    np.testing.assert_allclose(one.encode(texts), got, atol=1e-5)
    assert (
        one.digest
        == encoder.digest
        != clip.make(parallel, checkpoint=tmp_path, batch_size=8, dtype="bfloat16").digest
    )
    with pytest.raises(
        ValueError, match="text batch_size 12 is not divisible by 8 devices; use 8 or 16"
    ):
        clip.make(parallel, checkpoint=tmp_path, batch_size=12)


# WordLlama

needs_wordllama = pytest.mark.skipif(
    not importlib.util.find_spec("wordllama"), reason="the package wordllama is not installed"
)


@needs_wordllama
def test_wordllama():
    encoder = lookup.find("encoders", "wordllama")(None, length=8, dim=64)
    got = encoder.encode(
        ["open book", "", "a book", "clockwise rightwards and leftwards open circle arrows"]
    )
    assert got.shape == (4, 8, 64) and encoder.shape == (8, 64) and got.dtype == np.float32
    np.testing.assert_array_equal(
        (got != 0).any(axis=2).sum(axis=1), [3, 1, 3, 8]
    )  # the start and the tokens; then zeros
    np.testing.assert_array_equal(got[:, 0], got[[1] * 4, 0])
    np.testing.assert_array_equal(got[0, 2], got[2, 2])  # "book"
    assert encoder.truncated(["open book", "", "a " * 8, "a " * 3]) == [2]
    other = wordllama.make(None, length=8, dim=256)
    np.testing.assert_array_equal(
        encoder.encode(["red book"]), wordllama.make(None, length=8, dim=64).encode(["red book"])
    )
    assert len({encoder.digest, other.digest, wordllama.make(None, length=9, dim=64).digest}) == 3


@needs_wordllama
def test_wordllama_knows_words_and_places():
    encoder = wordllama.make(None)
    got = encoder.encode(
        [
            "red circle",
            "circle red",
            "sailboat",
            "motor boat",
            "tomato",
            *["green leaf fluttering in wind"] * 20,
        ]
    )
    assert 0.8 < got[got.any(axis=2)].std() < 1.2
    assert np.abs(got[0, 1] - got[1, 2]).max() > 0.3  # "red" at two places
    mean = [row[1:][row[1:].any(axis=1)].mean(axis=0) for row in got[2:5]]
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(mean[0], mean[1]) > cosine(mean[0], mean[2]) + 0.1


@needs_wordllama
def test_wordllama_of_another_version(monkeypatch):
    monkeypatch.setattr(wordllama, "VOCABULARY", (wordllama.VOCABULARY[0], "0" * 64))
    with pytest.raises(
        ValueError,
        match=(
            r"expected a SHA-256 of 00000000\.\.\., got 93248f2a; run: pip install "
            r"wordllama==0\.4\.0\.post1"
        ),
    ):
        wordllama.make(None)
    monkeypatch.setattr(wordllama, "VOCABULARY", ("nowhere.json", "0" * 64))
    with pytest.raises(ValueError, match="got no file; run"):
        wordllama.make(None)


def test_wordllama_refuses(monkeypatch):
    for settings in (dict(length=1), dict(dim=63), dict(dim=512), dict(dim=0)):
        with pytest.raises(
            ValueError, match="expected a length of at least 2 and an even dim up to 256, got"
        ):
            wordllama.make(None, **settings)
    monkeypatch.setattr(wordllama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"WordLlama's vectors need a package; run: pip install wordllama==0\.4\.0\.post1",
    ):
        wordllama.make(None)
