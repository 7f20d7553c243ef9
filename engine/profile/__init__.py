"""What the device ran, and where the time went."""
