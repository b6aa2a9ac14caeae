"""The WKV operators in chunked matrix form, in PyTorch, with backward passes of their own."""
