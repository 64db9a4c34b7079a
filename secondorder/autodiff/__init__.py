"""What torch's derivatives lack or get wrong, and what surrounds them."""
