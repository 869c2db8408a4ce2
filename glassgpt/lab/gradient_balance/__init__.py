"""`glassgpt lab gradient-balance`: how much of a gradient comes from responses."""
