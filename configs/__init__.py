"""The configs of the papers and of the examples; an installed dmd_jax has them as
dmd_jax.configs."""
