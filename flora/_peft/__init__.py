"""What `flora.peft` is made of: files, names, factors."""
