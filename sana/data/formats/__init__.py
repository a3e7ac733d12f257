"""What lies on disk or behind a URL, told apart and opened as a `Source`: one file per format, `open.py` joins them."""
