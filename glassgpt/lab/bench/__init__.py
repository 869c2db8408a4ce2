"""`glassgpt bench`: speed and memory beside peers, in one run, as ratios."""
