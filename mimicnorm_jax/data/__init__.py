"""Images: sources (random access) → pipeline (batches by step) → augment (on device)."""
