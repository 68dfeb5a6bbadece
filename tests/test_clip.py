"""Parity with transformers and OpenCLIP, the mistakes that would break it, and the CLIP score."""

import dataclasses
import gzip
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmd_jax import sharding
from dmd_jax.commands import score as score_lib
from dmd_jax.encoders import tokenizer
from dmd_jax.evals import clip_score, protocols, retrieval
from dmd_jax.models import clip, clip_text
from dmd_jax.weights import clip as weights
from dmd_jax.weights import published, state_dict
from tests import test_features
from tests.test_unet_sd import TOLERANCE, error, nhwc, randomize

torch = pytest.importorskip("torch")
test_features.import_torchvision()
open_clip, transformers = (pytest.importorskip(name) for name in ("open_clip", "transformers"))
safetensors = pytest.importorskip("safetensors.torch")

BOS, EOS, SIZE = 49406, 49407, 32
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
CAPTIONS = [
    "A cat, on the mat.",
    "",
    "two   DOGS and 17 kites!",
    "a man's café — it's 5 o'clock",
    "word " * 90,
]
PREFIX = "A photo depicts"
MODEL = {  # of OpenCLIP, with heads and a feed-forward layer as odd as g/14's
    "embed_dim": 20,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 2,
        "width": 24,
        "head_width": 8,
        "patch_size": 8,
        "mlp_ratio": 4.3637,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 4, "layers": 2},
}


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_tokenizer(directory):
    """All of CLIP's vocabulary, out of the package open_clip."""
    words = open_clip.tokenizer.SimpleTokenizer()
    names = dict(
        zip(("<start_of_text>", "<end_of_text>"), (tokenizer.BOS, tokenizer.EOS), strict=True)
    )
    write_json(
        directory / "vocab.json", {names.get(token, token): i for token, i in words.encoder.items()}
    )
    merges = (pathlib.Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(merges).decode().split("\n")
    (directory / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *lines[1 : 49152 - 256 - 2 + 1], ""]), encoding="utf-8"
    )
    write_json(directory / "special_tokens_map.json", {"pad_token": tokenizer.EOS})


def randomized(module, quiet):
    """All but the number that no vector depends on."""
    scale = module.logit_scale
    del module.logit_scale
    randomize(module.eval(), rf"{quiet}|embedding|out_proj").logit_scale = scale
    return module


def write_open_clip(directory, *, quick_gelu=False, pickled=False):
    """A directory, and the module in it."""
    directory.mkdir()
    model = {**MODEL, "quick_gelu": True} if quick_gelu else MODEL
    module = randomized(open_clip.CLIP(**model), "c_proj")
    write_json(
        directory / "open_clip_config.json",
        {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}},
    )
    if pickled:
        torch.save(module.state_dict(), directory / "open_clip_pytorch_model.bin")
    else:
        safetensors.save_file(module.state_dict(), directory / "open_clip_model.safetensors")
    write_tokenizer(directory)
    return directory, module


def write_transformers(directory, *, act="quick_gelu", eos=EOS, shard="1GB"):
    """A directory, and the module in it."""
    text = dict(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act=act,
        eos_token_id=eos,
    )
    vision = dict(
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_act=act,
    )
    vision |= dict(image_size=SIZE, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    module = randomized(transformers.CLIPModel(config), "fc2")
    module.save_pretrained(directory, max_shard_size=shard)
    processor = {
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": MEAN,
        "image_std": STD,
    }
    write_json(
        directory / "preprocessor_config.json",
        processor | {"size": SIZE, "crop_size": {"height": SIZE, "width": SIZE}},
    )
    write_tokenizer(directory)
    return directory, module


@pytest.fixture(scope="module")
def laion(tmp_path_factory):
    return write_open_clip(tmp_path_factory.mktemp("laion") / "model")


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    return write_transformers(tmp_path_factory.mktemp("openai") / "model")


def load(directory):
    settings, tensors = weights.read(directory)
    network = clip.clip(**{key: value for key, value in settings.items() if key != "name"})
    return network, state_dict.from_torch(tensors, network.abstract)


def vectors(directory, x, ids):
    network, params = load(directory)
    return tuple(
        np.asarray(a)
        for a in jax.jit(lambda p: (network.bind(p).images(x), network.bind(p).texts(ids)))(params)
    )


def expected(module, x, ids):
    x, ids = torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(ids).long()
    with torch.no_grad():
        if isinstance(module, open_clip.CLIP):
            return module.encode_image(x, normalize=True).numpy(), module.encode_text(
                ids, normalize=True
            ).numpy()
        out = module(input_ids=ids, pixel_values=x)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


@pytest.fixture(scope="module")
def inputs():
    """Images, and texts padded with the end token."""
    rng = np.random.default_rng(1)
    ids = np.full((3, 77), EOS, np.int32)
    for row, length in zip(ids, (1, 9, 75), strict=True):
        row[: length + 1] = [BOS, *rng.integers(1, BOS, length)]
    return rng.standard_normal((3, SIZE, SIZE, 3), np.float32), ids


def check(directory, module, inputs):
    for ours, theirs in zip(vectors(directory, *inputs), expected(module, *inputs), strict=True):
        assert ours.dtype == np.float32 and error(ours, theirs) < TOLERANCE


# the networks


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shard", ["1GB", "200KB"])
def test_parity_with_transformers(act, shard, inputs, tmp_path):
    check(*write_transformers(tmp_path / "a", act=act, shard=shard), inputs)
    assert (tmp_path / "a/model.safetensors.index.json").exists() == (shard != "1GB")


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_parity_with_open_clip(quick_gelu, pickled, inputs, tmp_path):
    check(*write_open_clip(tmp_path / "a", quick_gelu=quick_gelu, pickled=pickled), inputs)


def test_the_end_tokens_that_transformers_knows(inputs, tmp_path):
    """2 is the wrong one of old configs, for which it takes the largest id."""
    check(*write_transformers(tmp_path / "a", eos=2), inputs)


def test_the_whole_is_the_cosine(laion, inputs):
    network, params = load(laion[0])
    image, text = expected(laion[1], *inputs)
    assert error(network.apply(params, *inputs), (image * text).sum(1)) < TOLERANCE
    initial = network.init(0)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(lambda a: a.shape, network.abstract)
    assert initial["logit_scale"] == np.float32(np.log(1 / 0.07))


def test_what_pads_does_not_matter(laion, inputs):
    x, ids = inputs
    zeros = np.where(np.arange(77) > ids.argmax(1)[:, None], 0, ids)
    assert not np.array_equal(zeros, ids)
    np.testing.assert_array_equal(vectors(laion[0], x, zeros)[1], vectors(laion[0], x, ids)[1])


def transposed_projection(monkeypatch, directory):
    right = weights._places
    monkeypatch.setattr(
        weights,
        "_places",
        lambda name: [(new, (old, flat(change))) for new, (old, change) in right(name)],
    )


def flat(change):
    return change if change is not np.transpose else lambda a: a.reshape(a.shape[::-1])


def the_other_gelu(monkeypatch, directory):
    monkeypatch.setitem(clip_text.ACTIVATIONS, "gelu", clip_text.quick_gelu)


def no_first_norm(monkeypatch, directory):
    right = clip.ImageEncoder.__call__

    def call(self, images):
        self.pre_layrnorm = lambda x: x
        return right(self, images)

    monkeypatch.setattr(clip.ImageEncoder, "__call__", call)


def another_order_of_queries(monkeypatch, directory):
    right = weights._third
    monkeypatch.setattr(weights, "_third", lambda i: right((1, 0, 2)[i]))


def the_last_position(monkeypatch, directory):
    monkeypatch.setattr(
        clip.Clip,
        "texts",
        lambda self, ids: clip._unit(self.text_projection(self.text_model(ids)[:, -1])),
    )


def causal_patches(monkeypatch, directory):
    right = clip_text.Layer.__init__
    monkeypatch.setattr(
        clip_text.Layer,
        "__init__",
        lambda self, *args, **kw: right(self, *args, **kw | {"is_causal": True}),
    )


MISTAKES = [
    transposed_projection,
    the_other_gelu,
    no_first_norm,
    another_order_of_queries,
    the_last_position,
    causal_patches,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_would_show_mistakes(mistake, laion, inputs, monkeypatch):
    right = expected(laion[1], *inputs)
    mistake(monkeypatch, laion[0])
    assert (
        max(error(a, b) for a, b in zip(vectors(laion[0], *inputs), right, strict=True))
        > 50 * TOLERANCE
    )


COUNTS = {"ViT-B-32": 151_277_313, "ViT-L-14": 427_616_513, "ViT-g-14": 1_366_678_273}


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_shapes_of_open_clips_networks(name, tmp_path):
    model = open_clip.get_model_config(name)
    with torch.device("meta"):
        tensors = {
            key: np.broadcast_to(np.float32(0), tensor.shape)
            for key, tensor in open_clip.CLIP(**model).state_dict().items()
        }
    renamed = weights.Renamed(
        tensors, {new: place for key in tensors for new, place in weights._places(key)}
    )
    settings, problems = weights._open_clip({"model_cfg": model})
    abstract = clip.clip(**settings).abstract
    assert not problems and sum(a.size for a in jax.tree.leaves(abstract)) == COUNTS[name]
    ours = state_dict.to_torch(
        jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), abstract)
    )
    assert {key: a.shape for key, a in ours.items()} == {key: a.shape for key, a in renamed.items()}
    assert clip_score._name({"name": "", **settings}) == name


def test_names_and_shapes_of_openais_network():
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    vision = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    with torch.device("meta"):
        shapes = {
            key: tuple(tensor.shape)
            for key, tensor in transformers.CLIPModel(config).state_dict().items()
        }
    settings, problems = weights._hugging_face(
        {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": 768}
    )
    abstract = clip.clip(**settings).abstract
    ours = state_dict.to_torch(
        jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), abstract)
    )
    assert not problems and {key: a.shape for key, a in ours.items()} == shapes
    assert clip_score._name(settings) == "ViT-L-14-quickgelu"


# their files


def test_what_comes_first_in_a_directory_of_both(openai, laion, tmp_path):
    for directory in (laion[0], openai[0]):
        for file in directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert weights.read(tmp_path)[0]["vision"]["act"] == "quick_gelu"
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert weights.read(tmp_path)[0]["vision"]["act"] == "gelu"


def test_a_pickle_of_transformers(openai, inputs, tmp_path):
    directory, module = openai
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    torch.save(
        module.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        tmp_path / "pytorch_model.bin",
    )
    check(tmp_path, module, inputs)


def test_a_misfit_lists_both_sides(laion, tmp_path):
    tensors = safetensors.load_file(laion[0] / "open_clip_model.safetensors")
    tensors["visual.ln_pre.gain"] = tensors.pop("visual.ln_pre.weight")
    del tensors["transformer.resblocks.1.attn.in_proj_bias"]
    safetensors.save_file(tensors, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes(
        (laion[0] / "open_clip_config.json").read_bytes()
    )
    with pytest.raises(ValueError) as raised:
        load(tmp_path)
    layer = "text_model.encoder.layers.1.self_attn"
    parts = [f"missing {layer}.{part}_proj.bias" for part in "qkv"]
    for part in [*parts, "missing vision_model.pre_layrnorm.weight", "unused visual.ln_pre.gain"]:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        (
            "vision_cfg",
            "timm_model_name",
            "vit",
            "vision_cfg's timm_model_name is 'vit', expected None",
        ),
        ("text_cfg", "pool_type", "last", "text_cfg's pool_type is 'last', expected 'argmax'"),
        ("vision_cfg", "pool_type", "avg", "vision_cfg's pool_type is 'avg', expected 'tok'"),
    ],
)
def test_another_network_of_open_clip(laion, tmp_path, place, key, value, message):
    for file in laion[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = MODEL | {place: MODEL[place] | {key: value}}
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": model})
    with pytest.raises(
        ValueError, match=rf"its CLIP is not supported: {message}; use another model\.$"
    ):
        weights.read(tmp_path)


def test_another_preparation_of_images(openai, laion, tmp_path):
    for file in openai[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_json(
        tmp_path / "preprocessor_config.json", {"resample": 2, "size": 40, "image_mean": MEAN}
    )
    message = (
        f"resample is 2, expected 3; size is 40, expected {SIZE}; image_std of its images "
        f"is missing; use"
    )
    with pytest.raises(ValueError, match=message):
        weights.normalisation(tmp_path)
    assert (
        weights.normalisation(laion[0])
        == weights.normalisation(openai[0])
        == (tuple(MEAN), tuple(STD))
    )


def test_missing_files(tmp_path):
    name = "CLIP-ViT-g-14-laion2B-s12B-b42K"
    with pytest.raises(ValueError) as raised:
        weights.read(tmp_path / name)
    where = (
        f"; {name} is published at https://huggingface.co/laion/{name}, "
        f"open_clip_pytorch_model.bin with the SHA-256 6aac68"
    )
    assert "expected config.json and model.safetensors, or config.json and" in str(
        raised.value
    ) and where in str(raised.value)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"there is notes\.txt\. Nothing is downloaded by itself\.$"
    ):
        weights.read(tmp_path)


def test_known_hashes(openai, monkeypatch):
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in published.SHA256.values())
    path = openai[0] / "model.safetensors"
    monkeypatch.setitem(published.SHA256, "model/model.safetensors", published.sha256(path))
    assert published.find(path) == path and weights.read(openai[0])
    monkeypatch.setitem(published.SHA256, "model/model.safetensors", "0" * 64)
    with pytest.raises(
        ValueError,
        match=(
            rf"is damaged or another file: the published one has the SHA-256 {'0' * 64}, "
            rf"it is [0-9a-f]{{64}};"
        ),
    ):
        weights.read(openai[0])
    assert "with the SHA-256 6726825d0af5f729" in published.published(
        "pt_inception-2015-12-05-6726825d.pth"
    )


def test_settings_and_images_that_do_not_fit(laion):
    settings = {key: value for key, value in weights.read(laion[0])[0].items() if key != "name"}
    with pytest.raises(
        ValueError, match=r"^image_size 32 is not divisible by patch_size 7; change one of them\.$"
    ):
        clip.clip(**settings | {"vision": settings["vision"] | {"patch_size": 7}})
    network, params = load(laion[0])
    with pytest.raises(
        ValueError, match=r"^images are \(16, 16, 3\), expected 32 x 32 x 3; resize them\."
    ):
        network.bind(params).images(jnp.zeros((1, 16, 16, 3)))


# the score


@pytest.fixture(scope="module")
def parallel():
    return sharding.Parallel(sharding.make_mesh())


@pytest.fixture(scope="module")
def scorer(laion, parallel):
    return clip_score.make(parallel, batch_size=8, checkpoint=laion[0], crop_to=48)


@pytest.fixture(scope="module")
def pixels():
    """Smooth images, wider than high."""
    rng = np.random.default_rng(2)
    return np.asarray(
        [
            np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((73, 60)))
            for _ in CAPTIONS
        ]
    )


def prepare(image, crop_to=48):
    image = Image.fromarray(image)
    left = (image.width - image.height) // 2
    return image.crop((left, 0, left + image.height, image.height)).resize(
        (crop_to, crop_to), Image.Resampling.LANCZOS
    )


def prefixed(captions):
    """Tokens as OpenCLIP has them, padded with 0: cut, then three more put in, then cut again."""
    words = open_clip.tokenizer.SimpleTokenizer()
    inner, rows = words.encode(PREFIX), []
    for row in words(captions).tolist():
        row = [row[0], *inner, *row[1:]][:77]
        rows.append([*row[:-1], EOS if row[-1] else 0])
    return np.array(rows, np.int32)


def test_images_are_prepared_as_by_open_clip(scorer, laion, pixels):
    transform = open_clip.image_transform(
        SIZE, is_train=False, mean=MEAN, std=STD, resize_mode="shortest", interpolation="bicubic"
    )
    x = torch.stack([transform(prepare(image)) for image in pixels])
    with torch.no_grad():
        right = laion[1].encode_image(x, normalize=True)
    result = scorer.images(pixels)
    assert (
        result.shape == (5, 20) and result.dtype == np.float32 and error(result, right) < TOLERANCE
    )
    off = torch.stack(
        [
            transform(prepare(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            for image in pixels
        ]
    )
    with torch.no_grad():
        assert error(laion[1].encode_image(off, normalize=True), right) > 50 * TOLERANCE


def test_images_are_prepared_as_by_transformers(openai, parallel, pixels):
    from transformers.models.clip import image_processing_pil_clip

    directory, module = openai
    processor = image_processing_pil_clip.CLIPImageProcessorPil.from_pretrained(directory)
    squares = np.stack([np.asarray(prepare(image)) for image in pixels])
    x = processor(list(squares), return_tensors="np")["pixel_values"]
    theirs, _ = expected(module, nhwc(torch.tensor(x)), np.full((1, 77), EOS))
    made = clip_score.make(parallel, batch_size=8, checkpoint=directory, crop_to=0)
    assert (
        error(made.images(squares), theirs) < TOLERANCE and made.name == "ViT-24x3-8-32-quickgelu"
    )
    with pytest.raises(
        ValueError, match=r"^images are 60 x 73, expected square ones; set crop_to to crop them\.$"
    ):
        made.images(pixels)


def test_texts_have_the_prefix(scorer, laion, parallel):
    rows = prefixed(CAPTIONS)
    assert rows[-1, -1] == EOS and np.count_nonzero(rows == EOS) == len(rows)
    _, right = expected(laion[1], np.zeros((1, SIZE, SIZE, 3), np.float32), rows)
    assert error(scorer.texts(CAPTIONS), right) < TOLERANCE
    bare = clip_score.make(parallel, batch_size=8, checkpoint=laion[0], crop_to=48, prefix="")
    assert error(bare.texts(CAPTIONS), right) > 50 * TOLERANCE and bare.digest != scorer.digest


def test_tokens_of_a_clips_directory(openai):
    directory, right = openai[0], prefixed(CAPTIONS)
    words = tokenizer.load(directory, prefix=PREFIX)
    np.testing.assert_array_equal(
        words.ids(CAPTIONS), np.where(np.arange(77) > right.argmax(1)[:, None], EOS, right)
    )
    assert words.truncated(CAPTIONS) == [4] == tokenizer.load(directory).truncated(CAPTIONS)
    assert (
        words.truncated(["word " * 72, "word " * 73]) == [1]
        and tokenizer.load(directory).truncated(["word " * 75]) == []
    )
    assert (
        words.digest
        != tokenizer.load(directory).digest
        != tokenizer.load(directory, prefix="A").digest
    )


def test_the_score_is_the_mean_cosine(scorer, laion, pixels):
    images, texts = scorer.images(pixels), scorer.texts(CAPTIONS)
    by_hand = [
        float(a.astype(np.float64) @ b.astype(np.float64))
        for a, b in zip(images, texts, strict=True)
    ]
    score = clip_score.score(images, texts)
    assert score == pytest.approx(np.mean(by_hand), abs=1e-7) and abs(score) < 1
    assert clip_score.score(-images, texts) == pytest.approx(-score)  # nothing is cut off at 0
    assert scorer.name == "ViT-24x2-8-32" and clip_score.score(images, texts[::-1]) != score
    assert retrieval.recall(texts, CAPTIONS, texts, CAPTIONS, ks=(1,)) == {"R@1": 1.0}
    with pytest.raises(
        ValueError,
        match=(
            r"^there are 5 images and 4 captions in vectors of 20 and 20; expected one "
            r"caption for each"
        ),
    ):
        clip_score.score(images, texts[:4])


def test_the_digest_tells_settings_apart(scorer, laion, parallel):
    again, other = (
        clip_score.make(parallel, batch_size=16, checkpoint=laion[0], crop_to=size)
        for size in (48, 40)
    )
    assert again.digest == scorer.digest != other.digest


def test_the_command_measures_it(laion, scorer, pixels, tmp_path, monkeypatch):
    protocol = dataclasses.replace(
        protocols.COCO_2014,
        name="small",
        count=6,
        features={"name": "efficientnet", "size": 32},
        reference={"source": "folder.cropped", "size": 48},
        reference_count=0,
        crop_to=48,
        clip=scorer.name,
    )
    monkeypatch.setitem(protocols.PROTOCOLS, "small", protocol)
    monkeypatch.setitem(
        protocols.PROTOCOLS, "other", dataclasses.replace(protocol, name="other", clip="ViT-g-14")
    )
    monkeypatch.setenv("DMD_CACHE", str(tmp_path))
    (tmp_path / "images").mkdir()
    pixels = np.concatenate([pixels, pixels[:1, ::-1]])
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
    captions = ["a cat", "two dogs", "a red kite", "three men", "a car", "the sea"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))

    def run(protocol):
        paths = dict(
            images=tmp_path / "images",
            reference=tmp_path / "images",
            captions=tmp_path / "captions.txt",
            clip=laion[0],
        )
        arguments = [f"--{name}={value}" for name, value in paths.items()]
        return (
            score_lib.run(score_lib.parse([*arguments, f"--protocol={protocol}", "--batch_size=8"]))
            .rows[0]
            .scores
        )

    scores, vectors = run("small"), (scorer.images(pixels), scorer.texts(captions))
    assert scores[f"CLIP-{scorer.name}"] == pytest.approx(
        float((vectors[0] * vectors[1]).sum(axis=1).mean()), abs=1e-6
    )
    assert scores["R@10 of captions"] == 1 and 0 <= scores["R@1 of captions"] <= 1
    with pytest.raises(
        ValueError,
        match=rf"holds CLIP's {scorer.name}, but the protocol other has ViT-g-14; name that one",
    ):
        run("other")
