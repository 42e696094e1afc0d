"""Prints every field of the configuration: ``python -m mimicnorm_jax.config``."""

from mimicnorm_jax.config import describe_fields

if __name__ == "__main__":
    print(describe_fields())
