"""Memory, work and traffic of a training step, from the compiler."""
