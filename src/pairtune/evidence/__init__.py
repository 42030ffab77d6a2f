"""What a user believes afterwards. It reads run folders; no training loop calls it."""
