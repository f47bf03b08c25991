"""HTML report pages for artifacts."""
