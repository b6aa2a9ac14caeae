"""One GPU, DDP or ZeRO: Lightning strategies, and the weights and optimizer state that a rank holds under each."""
