"""The page of `glassgpt inspect --html`: `report.py` collects its numbers, `html.py` puts it together, the rest is the page."""
