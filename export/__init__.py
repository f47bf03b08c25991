"""The exporter: trains models offline and turns them into artifacts. It never imports the server."""
