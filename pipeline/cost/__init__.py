"""What a run will take, estimated from short trials."""
