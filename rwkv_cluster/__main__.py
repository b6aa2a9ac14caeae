"""`python -m rwkv_cluster` is the `rwkv-cluster` command."""

from __future__ import annotations

import sys

from rwkv_cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
