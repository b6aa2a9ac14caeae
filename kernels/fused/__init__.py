"""The passes of a block beside matrix products and WKV: token shift, norms and gates, each in one reading of memory."""
