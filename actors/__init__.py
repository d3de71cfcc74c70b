"""Plain classes that Ray hosts, and the two loops between them."""
