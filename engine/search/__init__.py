"""One live request: its method, its particles, what it waits for and its history."""
