"""A simulated Ascend NPU: the real torch_npu over a driver of our own, with operators written from the
vendor's documents.
"""
