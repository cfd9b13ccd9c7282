"""Training of the run-time models that `LearnedCutoff` uses. Only this imports TensorFlow for them."""
