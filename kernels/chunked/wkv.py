"""The three operators in chunked matrix form, under the names and signatures of `reference`.

Plain PyTorch on any device, forward and backward, any length of time and any decay.
"""

from rwkv_cluster.kernels.chunked.wkv6 import wkv5, wkv6
from rwkv_cluster.kernels.chunked.wkv7 import wkv7

__all__ = ["wkv5", "wkv6", "wkv7"]
