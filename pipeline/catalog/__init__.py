"""What a store holds: what is there, how it was made, how versions differ, what may go."""
