"""The laboratory: recipes of the papers' figures and tables, their runs, and what they show."""
