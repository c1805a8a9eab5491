"""Evidence that the methods do what the paper says of them, from real photographs."""
