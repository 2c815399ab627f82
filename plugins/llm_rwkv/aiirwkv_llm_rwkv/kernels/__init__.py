"""The WKV recurrences of RWKV, one module per way to compute them."""
