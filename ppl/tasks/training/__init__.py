"""What trained the small models that ship."""
