"""WKV operators of RWKV-5, RWKV-6 and RWKV-7: the definition, the fast forms, and the choice between them."""
