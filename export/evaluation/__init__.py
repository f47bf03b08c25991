"""Model quality: metrics and figures."""
