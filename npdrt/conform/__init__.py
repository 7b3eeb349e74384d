"""The referee: vectors, dialects, the judge."""
