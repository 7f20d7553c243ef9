"""What runs next: packing, priorities, measured costs, and the slots that particles live in."""
