"""Recording: hooks on a model and its optimizer, and what a rank writes."""
