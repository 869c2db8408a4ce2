"""Training: one flat function a stage, and the plumbing that it calls."""
