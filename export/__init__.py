"""The exporter: offline training and conversion of models to artifacts. It never imports the server."""
