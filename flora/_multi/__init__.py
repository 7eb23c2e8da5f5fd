"""What `flora.multi` is made of: stacks, mixed batches, runs, combinations."""
