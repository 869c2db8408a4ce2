"""`glassgpt lab temperature`: what temperature and top-p do to text, in numbers."""
