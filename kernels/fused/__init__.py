"""Everything that a block computes beside matrix products and WKV: token shift, norms, gates, in few passes over memory."""
