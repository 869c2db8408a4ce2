"""`glassgpt lab coherence`: how far back a model looks."""
