"""A simulated Ascend NPU: the real torch_npu, a driver of our own, and bodies for its operators from the
vendor's documents.
"""
