"""What runs on the device: batches of rows, rewards, images, and the threads that work."""
