"""Measurements that a reader can repeat: `rwkv-cluster bench data | wkv | step`. Each module has `run` and `format`."""
