import chex
import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import losses

RNG = np.random.default_rng(0)
X, X_REAL, X_FAKE = RNG.standard_normal((3, 4, 5, 5, 3)).astype(np.float32)


def direction(x, x_real, x_fake):
    """g of equation 7, per image, in numpy."""
    return (x_fake - x_real) / np.abs(x - x_real).mean(axis=(1, 2, 3), keepdims=True)


class LossesTest(chex.TestCase):  # a class because chex.variants needs one
    @chex.variants(with_jit=True, without_jit=True)
    def test_toy_golden(self):
        x, x_real, x_fake = (
            jnp.array(a).reshape(1, 2, 2, 1)
            for a in ((0.5, -1, 0.25, 2), (0, -0.5, 0.25, 1), (0.2, -0.9, 0.5, 1.5))
        )
        value, grad = self.variant(jax.value_and_grad(losses.distribution_matching_loss))(
            x, x_real, x_fake
        )
        np.testing.assert_allclose(value, 0.25625, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(grad), [0.1, -0.2, 0.125, 0.25], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gradient_is_g_over_n(self):
        grad = self.variant(jax.grad(losses.distribution_matching_loss))(X, X_REAL, X_FAKE)
        np.testing.assert_allclose(
            grad, direction(X, X_REAL, X_FAKE) / X.size, rtol=1e-5, atol=1e-9
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_normaliser_is_each_images_own(self):
        grad = self.variant(jax.grad(losses.distribution_matching_loss))
        farther = X.copy()
        farther[0] = X_REAL[0] + 10 * (X[0] - X_REAL[0])
        before, after = grad(X, X_REAL, X_FAKE), grad(farther, X_REAL, X_FAKE)
        np.testing.assert_allclose(after[0], before[0] / 10, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(after[1:], before[1:])

    @chex.variants(with_jit=True, without_jit=True)
    def test_an_image_equal_to_its_prediction_is_left_out(self):
        loss = self.variant(jax.value_and_grad(losses.distribution_matching_loss))
        x = X.copy()
        x[1] = X_REAL[1]
        value, grad = loss(x, X_REAL, X_FAKE)
        _, others = loss(X, X_REAL, X_FAKE)
        assert np.isfinite(value)
        np.testing.assert_array_equal(grad[1], np.zeros_like(x[1]))
        np.testing.assert_array_equal(np.delete(grad, 1, 0), np.delete(others, 1, 0))

    @chex.variants(with_jit=True, without_jit=True)
    def test_predictions_get_no_gradient(self):
        grads = self.variant(jax.grad(losses.distribution_matching_loss, argnums=(1, 2)))(
            X, X_REAL, X_FAKE
        )
        chex.assert_trees_all_equal(grads, (np.zeros_like(X),) * 2)

    @chex.variants(with_jit=True, without_jit=True)
    def test_small_directions_survive_bfloat16(self):
        x, x_real, x_fake = (jnp.full((1, 1, 1, 1), a, jnp.bfloat16) for a in (1.7, 0, 0.003 * 1.7))
        assert (
            x - (x - x_fake / x) == 0
        )  # what the paper's form, (x - stop_gradient(x - g))^2, would make of it
        grad = self.variant(jax.grad(losses.distribution_matching_loss))(x, x_real, x_fake)
        np.testing.assert_allclose(np.float32(grad).item(), 0.003, rtol=0.01)

    @chex.variants(with_jit=True, without_jit=True)
    def test_regression_is_the_mean_over_images(self):
        value, grads = self.variant(jax.value_and_grad(losses.regression_loss, argnums=(0, 1)))(
            X, X_REAL
        )
        np.testing.assert_allclose(value, np.mean((X - X_REAL) ** 2), rtol=1e-6)
        np.testing.assert_allclose(grads[0], 2 * (X - X_REAL) / X.size, rtol=1e-5)
        np.testing.assert_array_equal(grads[1], np.zeros_like(X))

    @chex.variants(with_jit=True, without_jit=True)
    def test_regression_with_another_distance(self):
        def largest(scale, x, y):
            return scale * jnp.max(jnp.abs(x - y), axis=(1, 2, 3))

        value = self.variant(lambda x, y: losses.regression_loss(x, y, 2.0, distance=largest))(
            X, X_REAL
        )
        np.testing.assert_allclose(
            value, 2 * np.abs(X - X_REAL).max(axis=(1, 2, 3)).mean(), rtol=1e-6
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_denoising_is_the_mean_over_everything(self):
        np.testing.assert_allclose(
            self.variant(losses.denoising_loss)(X, X_REAL), np.mean((X - X_REAL) ** 2), rtol=1e-6
        )

    @chex.variants(with_jit=True)
    def test_the_gradient_leads_to_the_teachers_distribution(self):
        """Generator a z + b, teacher N(0, 1), both scores exact: b goes to 0 and a to 1."""

        def posterior_mean(x_t, sigma, mean, std):
            return (std**2 * x_t + sigma**2 * mean) / (std**2 + sigma**2)

        def loss(generator, key):
            k_z, k_t, k_eps = jax.random.split(key, 3)
            a, b = generator
            x = a * jax.random.normal(k_z, (32, 4, 4, 1)) + b
            sigma = jnp.exp(jax.random.normal(k_t, (32, 1, 1, 1)))
            x_t = x + sigma * jax.random.normal(k_eps, x.shape)
            return losses.distribution_matching_loss(
                x, posterior_mean(x_t, sigma, 0.0, 1.0), posterior_mean(x_t, sigma, b, a)
            )

        def step(generator, key):
            return generator - 0.2 * jax.grad(loss)(generator, key), None

        descend = self.variant(
            lambda start: jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 400))[0]
        )
        np.testing.assert_allclose(descend(jnp.array([0.3, 2.0])), [1, 0], atol=0.01)
