"""Programs and graphs: their definition, export formats and purity checks."""
