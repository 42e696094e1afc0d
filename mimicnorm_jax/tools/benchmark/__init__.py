"""How fast a configuration trains and reads, how soon it starts, what its checkpoints cost."""
