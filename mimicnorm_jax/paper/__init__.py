"""The paper's figures, each a function of real modules and real images, and a command.

``python -m mimicnorm_jax.paper figure4 --out DIR`` writes ``figure4.png``, ``.svg`` and, with
the numbers, ``.json``.
"""
