"""Training of the run-time models of `LearnedCutoff`; nothing else of it imports TensorFlow."""
