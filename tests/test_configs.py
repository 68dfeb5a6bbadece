"""Every config and variant fits the package, and the papers' numbers stand in them."""

import pytest

from dmd_jax import bench, experiment, main

NAMES = (
    *("digits", "digits:no_matching", "digits:no_regression", "digits:smoke", "fashion_mnist", "fashion_mnist:small"),
    *("cifar10", "cifar10:uncond", "imagenet64", "imagenet64:stochastic"),
)


@pytest.mark.parametrize("name", NAMES)
def test_config(name):
    main.check(bench.load_config(name))


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "imagenet64"])
def test_unknown_variant(name):
    with pytest.raises(ValueError, match=rf"configs/{name}\.py has no variant 'other'; there are: "):
        bench.load_config(f"{name}:other")


@pytest.mark.parametrize(
    ("name", "learning_rate", "batch_size", "num_steps", "regression_weight", "pairs", "nfe"),
    [
        ("cifar10", 5e-5, 392, 300_000, 0.25, 100_000, 35),
        ("cifar10:uncond", 5e-5, 392, 300_000, 0.5, 500_000, 35),
        ("imagenet64", 2e-6, 336, 350_000, 0.25, 25_000, 511),
    ],
)
def test_the_papers_hyperparameters(name, learning_rate, batch_size, num_steps, regression_weight, pairs, nfe, tmp_path):
    """DMD, Appendix B, Tables 1 to 3."""
    config = bench.load_config(name)
    recipe = config.dmd.recipe
    for optimizer in (recipe.optimizer, recipe.fake_score_optimizer):
        expected = dict(learning_rate=learning_rate, warmup_steps=500, weight_decay=0.01, beta1=0.9, beta2=0.999, clip=10.0)
        assert optimizer.to_dict() == expected
    assert (config.dmd.batch_size, config.dmd.num_steps, config.pairs.count) == (batch_size, num_steps, pairs)
    assert (recipe.regression_weight, recipe.matching_weight, recipe.guidance_scale) == (regression_weight, 1.0, 1.0)
    assert recipe.matching_levels == (20, 980) and recipe.fake_score_levels == (0, 999)
    assert (recipe.distance.name, recipe.distance.size) == ("lpips", 224)
    assert experiment.make_sampler(config, "teacher", tmp_path).nfe == nfe and experiment.make_sampler(config, "dmd", tmp_path).nfe == 1
    assert config.process.to_dict() == dict(name="EDM", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    assert (config.evaluate.count, config.evaluate.seed_ranges) == (50_000, 3)
