"""Programs beside ``mimicnorm_jax.main``."""
