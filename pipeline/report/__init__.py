"""What came of a run: results, tables, charts, the page."""
