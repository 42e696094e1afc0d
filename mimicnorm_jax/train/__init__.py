"""Training: state, step, optimizer, loop, checkpoints and what a person sees of it."""
