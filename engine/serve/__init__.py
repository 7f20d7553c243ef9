"""A service: searches over HTTP, workers that run them, and a journal, so that nothing that was accepted is lost."""
