"""What a model is made of, as told by the names and shapes of its tensors: pure, no weights and no modules of
it.
"""
