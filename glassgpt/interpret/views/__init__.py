"""What `glassgpt inspect` shows: a module for each view, which gives numbers, a table and a picture."""
