"""The KV cache: its formats, its size, and quantized caches for Transformers. Importing it imports no
Transformers.
"""

from quantport.kvcache.kernel import KVKernel
from quantport.kvcache.rows import CacheDtype, cache_dtype, decode, encode
from quantport.kvcache.size import KVShape, bytes_per_token, kv_shape, kv_summary

__all__ = [
    "CacheDtype",
    "KVKernel",
    "KVShape",
    "bytes_per_token",
    "cache_dtype",
    "decode",
    "encode",
    "kv_shape",
    "kv_summary",
]
