"""The blocks of each RWKV version, a file a version."""
