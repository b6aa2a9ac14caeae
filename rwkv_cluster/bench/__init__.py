"""Measurements that a reader can repeat: `rwkv-cluster bench data | wkv | step | ddp`.

Each module has `run` and `format`.
"""
