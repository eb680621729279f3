"""The KV cache: its formats, its size, and quantized caches for Transformers. Importing it imports no
Transformers.
"""

from quantport.kvcache.default_cache import DefaultCache, default_cache, default_of, kv_cache
from quantport.kvcache.rows import CacheDtype, cache_dtype, decode, encode
from quantport.kvcache.size import KVShape, bytes_per_token, kv_shape, kv_summary

__all__ = [
    "CacheDtype",
    "DefaultCache",
    "KVShape",
    "bytes_per_token",
    "cache_dtype",
    "decode",
    "default_cache",
    "default_of",
    "encode",
    "kv_cache",
    "kv_shape",
    "kv_summary",
]
