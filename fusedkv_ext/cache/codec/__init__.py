"""Codecs: how the stored tensors of a cache plan are written, in 8, 4 and 2 bits."""

from fusedkv_ext.cache.codec.codec import RAW, Codec
from fusedkv_ext.cache.codec.codec_plan import CodecPlan
from fusedkv_ext.cache.codec.schemes import SCHEMES, Coding, Scheme
from fusedkv_ext.cache.codec.tensor_codec import Encoded, TensorCodec

__all__ = ["RAW", "SCHEMES", "Codec", "CodecPlan", "Coding", "Encoded", "Scheme", "TensorCodec"]
