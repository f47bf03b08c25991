"""Programs and graphs: definitions, file formats and purity checks."""
