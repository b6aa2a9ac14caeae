"""The three RWKV architectures, their weights files, initial values, loss and generation."""
