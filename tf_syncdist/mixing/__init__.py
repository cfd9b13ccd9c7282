"""How models are mixed: the update rules of the model-mixing strategies, as pure functions.

The rules use arithmetic operators only, so that they take NumPy arrays and TensorFlow's tensors,
one variable or a whole model as one vector. No clock, socket, lock or TensorFlow.
"""
