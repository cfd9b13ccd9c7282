"""Training of the run-time models of `LearnedCutoff`; it takes TensorFlow, their use does not."""
